"""What `tests/test_training.py` lets two gloo processes do, in one start of torchrun: python two_processes.py LATENTS OUT."""
import sys
from pathlib import Path

import torch

from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.fidelity import Pieces, generate, measure_reference
from spherical_lfm.paths import SlerpPath, arm_path
from spherical_lfm.sampling import LoadedRun, Sampler
from spherical_lfm.sit import SiT
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.training import TrainConfig, Trainer

CONFIG = dict(model='SiT-Ti/2', steps=12, batch_size=16, log_every=1, ema_decay=.9, lr=2e-3, max_grad_norm=1.)

ARMS = {'spherical-slerp': {}, 'vanilla-linear': dict(prediction='data', skip=True)}


def fit(latents: Path, out: Path, arm: str = 'spherical-slerp', until: int | None = None, **more):
    "Train a small run."
    data = LatentDataset(latents, project=arm_path(arm).projection)
    return Trainer(TrainConfig(arm=arm, **CONFIG | more), data, out).fit(until=until, progress=False)


def samples(out: Path) -> dict:
    "Features of thirty samples of an untrained network."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SiT.from_name('SiT-Ti/2', input_size=4, in_channels=16, num_classes=10).requires_grad_(False)
        for p in net.parameters(): p += .05*torch.randn(p.shape)
    run = LoadedRun(net, SlerpPath(), {'weights': 'untrained'})
    return generate(out, run, load_tokenizer('digits', spherical=True), torch.arange(30) % 10, 'digits', Sampler(4), pieces=Pieces(8, progress=False))


if __name__ == '__main__':
    latents, out = map(Path, sys.argv[1:])
    for arm, more in ARMS.items(): fit(latents, out/f'ddp-{arm}', arm, **more)
    fit(latents, out/'fsdp-vanilla-linear', 'vanilla-linear', parallel='fsdp', **ARMS['vanilla-linear'])
    fit(latents, out/'accumulated', accumulate=2)
    for parallel in ('ddp', 'fsdp'): fit(latents, out/f'{parallel}-map', parallel=parallel, flow_map=2)
    for until in (6, None): fit(latents, out/'fsdp-started', parallel='fsdp', start=str(out/'one-map'), flow_map=2, until=until)
    fit(latents, out/'fsdp', parallel='fsdp')
    fit(latents, out/'fsdp-half', parallel='fsdp', until=6)
    fit(latents, out/'half-one', parallel='fsdp') # began with one process
    try: fit(latents, out/'odd', batch_size=15)
    except ValueError as e: Path(out/f'refused-{torch.distributed.get_rank()}').write_text(str(e))
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), out/'latents', Encoding(flip=False, shard_size=200), progress=False)
    samples(out/'samples')
    measure_reference(ImageSource('digits'), out/'reference', 'digits', shard=200, progress=False)
    torch.distributed.destroy_process_group()
