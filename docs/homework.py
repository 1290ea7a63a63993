"""The homework: a copy of the repository in which twelve functions wait to be written.

    python docs/homework.py DIR                   makes it, in a new folder; it can move to another machine
    python docs/homework.py --check               in DIR: how many of each exercise's tests pass
    python docs/homework.py --check pss kl        of these alone, with what pytest says
    python docs/homework.py --solution pss        in DIR: puts one function back as it was

A function that waits keeps its signature and its docstring, which says what to write. The solutions are
the code that the copy was made from, found by name: nothing here can differ from it. DIR keeps them in a
zip file, so that nobody reads them by accident. Each test runs in a process of its own, for LIMIT seconds
at most. Run --check and --solution in DIR; there is no need for git. train.py and evaluate.py stop in DIR
at a function that waits: run them in the clone.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.command import Parser  # noqa: E402
from docs import break_it  # noqa: E402

sys.path.remove(str(ROOT))                              # transformers would import our kernels/, and keep them

LIMIT = 120                                             # seconds until a test is taken to hang
SOLUTIONS = ".solutions.zip"                            # in DIR: the files of the exercises, as they were
QUOTE = ("docs/walkthrough*", "docs/modify.md", "docs/*.txt")   # pages with lines of the solutions
WAITS = "raise NotImplementedError"


@dataclass(frozen=True)
class Exercise:
    file: str
    symbol: str                                         # function, or Class.function
    test_file: str
    tests: str                                          # their names
    needs: tuple[str, ...] = ()                         # earlier exercises that its tests run too

    @property
    def name(self) -> str:
        return {"LinearLogprob.backward": "backward", "Anchor.kl": "anchor"}.get(self.symbol, self.symbol.strip("_"))


# An exercise's tests run no other exercise's function, but for `needs`.
EXERCISES = [
    Exercise("personas.py", "mix", "tests/test_personas.py", """
        test_p27_a_group_shares_its_persona_in_prompt_mode_and_not_in_rollout_mode
        test_p27_a_draw_depends_on_seed_and_key_not_on_the_batch_the_rank_or_the_order
        test_p27_arms_of_different_rho_speak_alike_where_both_speak
        test_plain_rlvr_needs_no_pool
        test_a_mix_that_makes_no_sense_is_refused"""),
    Exercise("evaluation/measures.py", "pss", "tests/test_evaluate.py", """
        test_pss_is_zero_when_every_persona_fails_and_one_when_all_are_equal
        test_scores_equal_the_hand_computed_table"""),
    Exercise("verifier/value.py", "_equal_exactly", "tests/test_rewards.py", """
        test_p23_a_percent_accepts_fraction_and_number_but_a_fraction_not_the_number
        test_p23_a_rounded_or_almost_equal_value_is_wrong
        test_p23_points_of_both_signs_tell_x_from_its_absolute_value
        test_p23_a_point_where_a_side_is_undefined_decides_nothing
        test_p23_the_corpus_has_no_false_positive_and_99_percent_are_right"""),
    Exercise("grpo.py", "group_advantages", "tests/test_grpo.py", """
        test_advantages_equal_their_formula
        test_p8_a_flat_group_stays_at_zero_beside_groups_that_are_not
        test_p8_a_small_true_difference_is_not_taken_for_noise
        test_p8_a_group_of_one_is_refused
        test_p8_a_reward_that_is_not_finite_is_refused"""),
    Exercise("grpo.py", "token_weights", "tests/test_grpo.py", """
        test_p9_the_weights_of_two_of_four_completions_by_hand
        test_p10_weights_of_parts_are_the_parts_of_the_weights
        test_p9_a_total_or_a_length_of_0_counts_as_1_and_an_unknown_kind_is_refused"""),
    Exercise("grpo.py", "policy_loss", "tests/test_grpo.py", """
        test_p12_the_clip_leaves_these_gradients
        test_losses_and_their_gradients_equal_the_formula
        test_p11_the_first_inner_step_is_reinforce_and_the_second_has_ratios_off_one
        test_p21_a_rank_without_tokens_has_a_zero_loss_to_backpropagate_and_the_same_metrics
        test_a_sampler_correction_scales_each_token_and_does_not_carry_gradient
        test_the_metrics_of_a_loss_carry_no_gradient""", ("token_weights",)),
    Exercise("grpo.py", "kl", "tests/test_grpo.py", """
        test_p13_kl_estimators_equal_their_formula_and_pass_gradcheck
        test_p13_k3_is_never_negative_and_zero_at_equality
        test_p13_the_expected_gradient_of_each_estimator_is_that_of_the_named_kl
        test_p13_ratios_of_a_kl_are_cut_and_logprobs_alone_has_a_gradient"""),
    Exercise("model.py", "pack", "tests/test_model.py", """
        test_p1_a_label_moves_only_its_own_logprob
        test_the_prompt_is_forwarded_once_for_its_completions
        test_p17_sequences_of_a_pack_do_not_see_each_other
        test_p3_packed_padded_shared_and_single_forwards_agree"""),
    Exercise("sampling/draw.py", "sample_rows", "tests/test_rollout.py", """
        test_a_row_takes_the_first_token_whose_float64_cdf_passes_its_uniform
        test_rows_that_are_not_finite_and_tokens_that_are_impossible"""),
    Exercise("kernels/decode_attention.py", "torch_decode_attention", "tests/test_decode_attention.py", """
        test_both_write_the_new_token_behind_the_rows_tokens_and_change_nothing_else
        test_both_equal_a_float64_loop_for_every_dtype_and_window
        test_both_survive_scores_of_thousands"""),
    Exercise("kernels/torch_linear_logprob.py", "LinearLogprob.backward", "tests/test_kernels.py", """
        test_p22_gradients_of_both_outputs_pass_gradcheck_chunked_or_kept
        test_p22_either_output_alone_gives_the_gradients_of_autograd
        test_p22_each_input_alone_gets_its_gradient
        test_p22_d_hidden_is_summed_in_fp32_over_many_chunks
        test_p22_errors_stay_within_twice_those_of_plain_torch_in_the_same_dtype"""),
    Exercise("training/anchor.py", "Anchor.kl", "tests/test_wiring.py", """
        test_the_anchor_is_the_exact_kl_from_the_start_model_with_its_gradient""",
             ("pack", "sample_rows", "torch_decode_attention")),
]
NAMED = {exercise.name: exercise for exercise in EXERCISES}


# --------------------------------------------------------------------------------------------------
# A function in its file


def found(text: str, exercise: Exercise) -> ast.FunctionDef:
    """The exercise's function in its module's text. Raises ValueError if it is not there."""
    try:
        node = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"{exercise.file}, line {error.lineno}: {error.msg}") from error
    for name in exercise.symbol.split("."):
        node = next((x for x in node.body if getattr(x, "name", None) == name), None)
        if node is None:
            raise ValueError(f"{exercise.file} has no {exercise.symbol} any more")
    return node


def span(node: ast.FunctionDef) -> slice:
    """Its lines, with what decorates it."""
    return slice(min(x.lineno for x in (node, *node.decorator_list)) - 1, node.end_lineno)


def blanked(text: str, exercise: Exercise) -> str:
    """The module with the function's signature and docstring alone."""
    node, lines = found(text, exercise), text.splitlines(keepends=True)
    doc = node.body[0]
    if ast.get_docstring(node) is None:
        raise ValueError(f"{exercise.symbol} has no docstring to write it from")
    return "".join([*lines[:doc.end_lineno], f"{' ' * doc.col_offset}{WAITS}\n", *lines[node.end_lineno:]])


def restored(text: str, original: str, exercise: Exercise) -> str:
    """The module with the function as `original` has it."""
    lines, old = text.splitlines(keepends=True), original.splitlines(keepends=True)
    lines[span(found(text, exercise))] = old[span(found(original, exercise))]
    return "".join(lines)


def waits(exercise: Exercise) -> bool:
    """Whether nobody has begun to write it."""
    node = found(read(exercise.file), exercise)
    return [ast.unparse(x) for x in node.body[1:]] == [WAITS]


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Making it, solving it


def make(folder: Path) -> None:
    """The homework in a new folder. Raises ValueError or OSError where it cannot be made."""
    if (ROOT / SOLUTIONS).exists():
        raise ValueError("this is a homework already: make another one from the repository")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        break_it.copy(folder)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{ROOT} is no clone: git is asked what belongs to it") from error
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if any(fnmatch(str(path.relative_to(folder)), page) for page in QUOTE):
            path.unlink()
    with zipfile.ZipFile(folder / SOLUTIONS, "w", zipfile.ZIP_DEFLATED) as kept:
        for file in {exercise.file for exercise in EXERCISES}:
            kept.write(folder / file, file)
    for exercise in EXERCISES:
        place = folder / exercise.file
        place.write_text(blanked(place.read_text(encoding="utf-8"), exercise), encoding="utf-8")


def solve(exercise: Exercise) -> None:
    """Puts the function back as it was. What else was written in its file stays."""
    try:
        with zipfile.ZipFile(ROOT / SOLUTIONS) as kept:
            original = kept.read(exercise.file).decode()
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{SOLUTIONS} is damaged: make the homework anew in another folder") from error
    break_it.write(ROOT / exercise.file, restored(read(exercise.file), original, exercise))


# --------------------------------------------------------------------------------------------------
# Checking it


def results(exercise: Exercise, log: Path) -> dict[str, str]:
    """{test: passed, failed, hangs, crashes or is not run}. What pytest says goes to `log`."""
    words, out = {0: "passed", 1: "failed", None: f"hangs (over {LIMIT} s)"}, {}
    for test in exercise.tests.split():
        log.write_text("")
        code = break_it.run(f"{exercise.test_file}::{test}", ROOT, log, LIMIT, "rewrite")
        said = log.read_text(encoding="utf-8", errors="replace")
        out[test] = words.get(code, "crashes" if code and code < 0 else "is not run")
        if code == 0 and not re.search(r"\d passed", said):
            out[test] = "is not run"                    # skipped, which is no pass
        if out[test] != "passed":
            with log.with_suffix(".all").open("a") as failures:
                failures.write(said)
    return out


def score(exercise: Exercise, log: Path) -> tuple[int, str]:
    """How many of its tests pass, and why not the others."""
    try:
        if waits(exercise):
            return 0, f"{exercise.symbol} is not written yet"
        first = [name for name in exercise.needs if waits(NAMED[name])]
    except ValueError as error:
        return 0, str(error)
    got = results(exercise, log)
    why = [f"{test} {word}" for test, word in got.items() if word != "passed"]
    if why and first:
        why[0] += f"; first write {', '.join(first)}, which its tests run too"
    return len(got) - len(why), why[0] if why else ""


def check(exercises: list[Exercise], talk: bool) -> bool:
    """Prints a line for each exercise, and pytest's words if asked. Whether all are solved."""
    break_it.warm_up()
    solved = 0
    with tempfile.TemporaryDirectory() as folder:
        for exercise in exercises:
            log, total = Path(folder) / exercise.name, len(exercise.tests.split())
            passed, why = score(exercise, log)
            solved += passed == total
            number = EXERCISES.index(exercise) + 1
            line = f"{number:2} {exercise.name:23} {exercise.file:32} {passed} of {total}  {why}"
            print(line.rstrip(), flush=True)
            if talk and log.with_suffix(".all").exists():
                print(log.with_suffix(".all").read_text(encoding="utf-8"))
    print(f"{solved} of {len(exercises)} exercises solved")
    return solved == len(exercises)


def main() -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", nargs="?", metavar="DIR", type=Path, help="a new folder, for the homework")
    add("--check", nargs="*", metavar="NAME", help=f"score these exercises, or all: {', '.join(NAMED)}")
    add("--solution", metavar="NAME", help="put this function back as it was")
    args = parser.parse_args()
    if sum(x is not None for x in (args.folder, args.check, args.solution)) != 1:
        parser.error("give one of DIR, --check and --solution")
    if unknown := [n for n in [*(args.check or []), *([args.solution] if args.solution else [])] if n not in NAMED]:
        parser.error(f"no exercise is named {unknown[0]}: take one of {', '.join(NAMED)}")
    if not args.folder and not (ROOT / SOLUTIONS).exists():
        parser.error("this is no homework: make one with a new folder's name, and run its docs/homework.py")
    try:
        if args.folder:
            make(args.folder)
            print(f"{len(EXERCISES)} exercises are in {args.folder}; there: python docs/homework.py --check")
        elif args.solution:
            solve(NAMED[args.solution])
        else:
            return int(not check([NAMED[n] for n in args.check or NAMED], bool(args.check)))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # its processes are forked
    sys.exit(main())
