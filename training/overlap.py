"""`--overlap`: a copy of the policy samples the next batch while this one is trained on."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from rollout import Sampler


def overlapped(roll_out: Callable, job, first: int) -> Iterator[tuple]:
    """(batch, lag) of each step from `first` on, as train.rollouts gives them; the lag is 1.

    roll_out: train.roll_out. job: a training.run.Job.
    The first batch after a checkpoint that `--save-every` asks for is sampled with its very
    weights. So a run that is resumed from there is the same run. Resumed after SIGTERM, or where a
    shorter run had ended, it samples one more batch that way.
    """
    args, ahead = job.args, None
    author, earlier = (Sampler(model, args.slots, not args.no_cuda_graphs)
                       for model in (job.author, copy.deepcopy(job.author)))
    device = job.author.device
    on_gpu = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
    thread = ThreadPoolExecutor(1, "", *on_gpu)         # not `with`: the rewarder closes first
    for step in range(first, args.steps):
        batch, lag = (ahead.result(), 1) if ahead else (roll_out(author, job, step), 0)
        ahead = None
        if step + 1 < args.steps and (step + 1) % args.save_every:
            earlier.model.load_state_dict(job.author.state_dict())
            ahead = thread.submit(roll_out, earlier, job, step + 1)
        yield batch, lag
