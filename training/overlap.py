"""`--overlap`: a copy of the policy samples the next batch while this one is trained on."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def overlapped(roll_out: Callable, job, first: int) -> Iterator[tuple]:
    """(batch, lag) of each step from `first` on, as train.rollouts gives them; the lag is 1.

    roll_out: train.roll_out. job: a training.run.Job.
    The first batch after a checkpoint that `--save-every` asks for is sampled with its very
    weights. So a run that is resumed from there is the same run. Resumed after SIGTERM, or where a
    shorter run had ended, it samples one more batch that way.
    """
    args, device, ahead = job.args, job.model.device, None
    frozen = {id(p): p for p in job.author.parameters() if not p.requires_grad}     # not copied
    author, earlier = (job.sampler(model, job.longest_prompt)
                       for model in (job.author, copy.deepcopy(job.author, frozen)))
    on_gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None

    def sample(step: int, copied: torch.cuda.Event | None):
        """In a stream of its own, or each kernel would wait for those of the training."""
        if not on_gpu:
            return roll_out(earlier, job, step)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_event(copied)
            return roll_out(earlier, job, step)

    thread = ThreadPoolExecutor(1)                      # not `with`: the rewarder closes first
    for step in range(first, args.steps):
        wanted, lag = ((ahead.result,), 1) if ahead else ((roll_out, author, job, step), 0)
        batch = job.stop.agreed(*wanted)
        ahead = None
        if step + 1 < args.steps and (step + 1) % args.save_every:
            earlier.model.load_state_dict(job.author.state_dict())
            copied = torch.cuda.current_stream(device).record_event() if on_gpu else None
            ahead = thread.submit(sample, step + 1, copied)
        yield batch, lag
