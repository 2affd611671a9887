"""A comparison of the paper from images to report without a GPU: small networks of random weights in published formats.

    python scripts/dry_run.py                                  2,000 images in 1,000 classes at 256 px, two processes
    python scripts/dry_run.py --images 24 --classes 12 --size 64   and so on: a small one

The preset is a real one with fewer layers, steps and samples. Its autoencoder lies in a cache of the Hugging Face hub
as FLUX.2's does, Inception in that of torch, images in a folder per class. The comparison is started by torchrun, loses
a process while it encodes, is sent SIGTERM while it trains, loses a process while it samples, and is started again by
the same command each time. Then one process makes it undisturbed, both are compared, and the figures are printed. What
is promised: latents, losses and weights of one process up to rounding, and metrics of the features that follow.
"""
import argparse
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision.io import write_jpeg

from spherical_lfm import experiments, fidelity
from spherical_lfm.engine import latents
from spherical_lfm.engine.files import write_json
from spherical_lfm.engine.processes import processes
from spherical_lfm.engine.report import environment
from spherical_lfm.engine.runs import checkpoints
from spherical_lfm.engine.weights import TOKENIZERS
from spherical_lfm.experiments import PRESETS, Preset, compare, get_preset
from spherical_lfm.sit import SIZES
from spherical_lfm.training import Trainer

ARMS = ('vanilla-linear', 'spherical-slerp')
#: Where the comparison is cut off, in this order, and what is on disk then.
STOPS = {'encode': 'latents', 'train': 'saved', 'sample': 'features'}
#: Phases of a comparison and the calls they consist of; of nested ones the outer counts.
PHASES = (
    ('encode', experiments, 'prepare_latents'), ('reference', experiments, 'prepare_reference'),
    ('train', Trainer, 'fit'), ('curve', experiments, '_score_checkpoints'), ('sample', experiments, 'generate'),
    ('score', experiments, '_metrics'), ('report', experiments, '_write_report'),
)
#: How far the two may be apart: rounding of another number of processes, threads and images at a time.
LIMITS = {
    'latents': 5e-2,  # largest difference; encoders in bf16 round to 8 bits
    'losses': 1e-4,   # of every step, relative
    'weights': 1e-3,  # root of the mean square, relative
    'metrics': 2e-2,  # relative
    'neighbours': 2,  # samples or images that precision and recall count otherwise
}


# --- what is not there without a network ---

def write_images(folder: Path, count: int, classes: int, side: int):
    "Photographs of nothing, as JPEG in a folder per class: coarse noise in the colour of the class, wider than high."
    for n in range(count):
        tint = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(n % classes))
        noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2**20 + n))
        picture = F.interpolate((tint + noise)[None]/2, (side, side*5//4), mode='bilinear')[0]
        place = folder/f'n{n % classes:08d}'
        place.mkdir(parents=True, exist_ok=True)
        write_jpeg((255*picture).byte(), str(place/f'{n:08d}.JPEG'), 90)


def hub_folder(hub: Path, repository: str) -> Path:
    "The only snapshot of a repository in a cache of the Hugging Face hub."
    place, commit = hub/f'models--{repository.replace("/", "--")}', '0'*40
    (place/'refs').mkdir(parents=True, exist_ok=True)
    (place/'refs'/'main').write_text(commit)
    return place/'snapshots'/commit


def write_autoencoder(hub: Path, width: int, side: int):
    "FLUX.2's autoencoder with `width` channels for its 128; its statistics are those of its latents of noise."
    repository, subfolder, _ = TOKENIZERS['flux2']
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(block_out_channels=(width, 2*width, 4*width, 4*width), norm_num_groups=min(32, width))
    model.bn.momentum = None # the mean of what it sees
    pictures = F.interpolate(torch.rand(8, 3, 8, 8)*2 - 1, (side, side), mode='bilinear')
    with torch.no_grad():
        model.bn.train()(F.pixel_unshuffle(model.encode(pictures).latent_dist.mode(), 2))
    model.save_pretrained(hub_folder(hub, repository)/subfolder)


class _Blank(FeatureExtractorInceptionV3):
    "Inception as it is before it has weights."
    def load_state_dict(self, *_): return None


def write_inception(torch_home: Path) -> Path:
    "Inception's weights under their names in torch's cache, drawn such that activations keep their scale."
    file = torch_home/'hub'/'checkpoints'/Path(URL_INCEPTION_V3).name
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({}, file)
    state = _Blank('blank', ['2048'], feature_extractor_weights_path=file).state_dict()
    g = torch.Generator().manual_seed(0)
    for name, w in state.items():
        if w.ndim > 1: state[name] = torch.randn(w.shape, generator=g)*(2/w[0].numel())**.5
    torch.save(state, file)
    return file


def material(args) -> dict:
    "All of it below a folder, and the environment that leads there."
    place = args.out/'material'
    hub = place/'huggingface'/'hub'
    if not (place/'done').exists():
        write_images(place/'images', args.images, args.classes, args.size)
        write_autoencoder(hub, args.width, args.size)
        write_inception(place/'torch')
        (place/'done').touch()
    return os.environ | {
        'HF_HOME': str(hub.parent), 'HF_HUB_CACHE': str(hub), 'HF_HUB_OFFLINE': '1', 'TORCH_HOME': str(place/'torch')}


# --- what a process of the comparison does ---

def small(args) -> Preset:
    "The preset, made small."
    known = get_preset(args.preset) # in float32 where bf16 is emulated: an autoencoder is thirty times as slow in it
    train = known.train | dict(steps=args.steps, batch_size=args.batch_size, log_every=1)
    train['checkpoint_every'] = -(-args.steps//2)
    if args.eager: train['compile'] = False
    if args.precision: train['precision'] = args.precision
    size = known.train['model'].removeprefix('SiT-').split('/')[0]
    SIZES[size] = (SIZES[size][0], args.layers, SIZES[size][2])
    sampler = replace(known.sampler, steps=args.solver_steps, precision=args.precision or known.sampler.precision)
    return replace(known, image_size=args.size, train=train, sampler=sampler, guidances=tuple(args.guidances),
                   samples=args.samples, curve_samples=args.curve_samples, metrics=tuple(args.metrics),
                   extractor=args.extractor)


class Clock:
    "Seconds of this process in each phase, kept in a file with the most memory it has had."
    def __init__(self, file: Path):
        self.file, self.seconds, self.inside = file, Counter(), False

    def watch(self, phase: str, where, name: str):
        "Measure the calls of a function."
        work = getattr(where, name)

        @functools.wraps(work)
        def measured(*args, **kwargs):
            if self.inside: return work(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[phase] += time.perf_counter() - began
                self.write()
        setattr(where, name, measured)

    def write(self):
        "What is known so far."
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10 # from KiB
        write_json(self.file, {'seconds': self.seconds, 'peak_mib': round(peak)})


def kill_after(where, name: str):
    "Let this process die, as one does that the system is short of memory for, once a function has been called."
    work = getattr(where, name)

    def last(*args, **kwargs):
        work(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(where, name, last)


def stop_at(phase: str, args):
    "Arrange for an interruption: in the last process, or for SIGTERM as a scheduler sends it, to the launcher."
    main, last = processes().is_main_process, processes().process_index == processes().num_processes - 1
    if phase == 'encode' and last: kill_after(latents, '_encode_shard')
    if phase == 'sample' and last: kill_after(fidelity, '_make_shard')
    if phase != 'train' or not main: return
    step = Trainer.train_step

    def warned(self):
        if self.config.arm == ARMS[1] and self.step == args.steps//4: os.kill(os.getppid(), signal.SIGTERM)
        return step(self)
    Trainer.train_step = warned


def rehearse(args):
    "The comparison, or what is left of it, in this process."
    clock = Clock(args.into/'clock'/f'{args.cut_off}-{os.environ.get("RANK", 0)}.json')
    for phase in PHASES: clock.watch(*phase)
    # files so small that every process has several
    experiments.Encoding = partial(latents.Encoding, shard_size=-(-args.images//8))
    experiments.Pieces = partial(fidelity.Pieces, shard=-(-args.samples//4))
    processes()
    stop_at(args.cut_off, args)
    compare(small(args), ARMS, args.into/'comparison', str(args.out/'material'/'images'), progress=False)


# --- starting, cutting off, comparing ---

def start(args, run: Path, name: str, count: int, env: dict) -> int:
    "Start the comparison in so many processes; the exit code."
    launcher = [Path(sys.executable).parent/'torchrun', '--standalone', '--nproc_per_node', count]
    work = [__file__, *sys.argv[1:], '--into', run, '--cut_off', name]
    command = [*(launcher if count > 1 else [sys.executable]), *work]
    env = env | {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1)//args.processes))} # the same for one process
    began = time.perf_counter()
    with open(run/f'{name}.log', 'w') as log:
        code = subprocess.run([*map(str, command)], env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f'{run.name:>11}, {name:>6}: {count} process{"es"*(count > 1)}, exit code {code}, '
          f'{time.perf_counter() - began:.0f} s', flush=True)
    return code


def remains(made: Path) -> dict:
    "What of a comparison is on disk."
    kept = {arm: [str(f.relative_to(made)) for f in checkpoints(made/arm)] for arm in ARMS}
    return {
        'latents': {f.name: f.stat().st_mtime_ns for f in made.glob('latents/*.safetensors')},
        'checkpoints': sum(kept.values(), []), 'saved': kept[ARMS[1]], # of the arm that the signal met
        'features': len([*made.glob('*/features/*/features-*.safetensors')]),
    }


def interrupted(args, env: dict) -> dict:
    "The comparison in several processes, cut off and started again; what each start left for the next."
    run, left = args.out/'interrupted', {}
    run.mkdir()
    for phase in args.stops:
        code = start(args, run, phase, args.processes, env)
        left[phase] = remains(run/'comparison')
        if code == 0 or not left[phase][STOPS[phase]]: sys.exit(f'the end of {run/phase}.log is not how it should be cut off')
    if start(args, run, 'finish', args.processes, env): sys.exit((run/'finish.log').read_text()[-5000:])
    return left


def undisturbed(args, env: dict):
    "The comparison in one process."
    run = args.out/'whole'
    run.mkdir()
    if start(args, run, 'finish', 1, env): sys.exit((run/'finish.log').read_text()[-5000:])


def apart(a: dict, b: dict) -> float:
    "The largest relative difference of some numbers; infinite if they are not the same ones."
    return max(abs(a[k] - b[k])/max(abs(b[k]), 1e-3) for k in b) if a.keys() == b.keys() else torch.inf


def apart_in_weights(a: Path, b: Path) -> float:
    "Relative difference of the averaged weights of two checkpoints."
    p, q = (load_file(f/'ema'/'diffusion_pytorch_model.safetensors') for f in (a, b))
    return (sum((p[k] - q[k]).square().sum() for k in q)/sum(x.square().sum() for x in q.values())).sqrt().item()


def scores(row: dict, counts: dict) -> tuple[dict, dict]:
    "Metrics of an arm by guidance or step, and those that count: as so many samples or images."
    points = [(f'guidance {g["guidance"]}', g) for g in row['guided']]
    points += [(f'step {p["step"]}', p) for p in row['curve']]
    every = {(where, k): v for where, found in points for k, v in found.items() if k not in ('guidance', 'step')}
    return ({k: v for k, v in every.items() if k[1] not in counts},
            {k: v*counts[k[1]] for k, v in every.items() if k[1] in counts})


def logged(run: Path) -> dict:
    "Losses by step."
    return {r['step']: r['loss'] for r in map(json.loads, (run/'log.jsonl').read_text().splitlines())}


def difference(args, a: Path, b: Path) -> dict:
    "How far two comparisons are apart, in what `LIMITS` lists."
    x, y = (latents.LatentDataset(run/'latents', resident=True) for run in (a, b))
    first, second = (json.loads((run/'report.json').read_text())['arms'] for run in (a, b))
    found = dict.fromkeys(LIMITS, 0.)
    found['latents'] = max((x.z[k] - y.z[k]).abs().max().item() for k in y.z) if torch.equal(x.y, y.y) else torch.inf
    counts = {'precision': args.samples, 'recall': len(y)}
    for arm in ARMS:
        (p, m), (q, n) = (scores(rows[arm], counts) for rows in (first, second))
        now = {'losses': apart(logged(a/arm), logged(b/arm)), 'metrics': apart(p, q),
               'weights': apart_in_weights(*(checkpoints(run/arm)[-1] for run in (a, b))),
               'neighbours': max([0., *(abs(m[k] - n[k]) for k in n)])}
        found |= {k: max(found[k], v) for k, v in now.items()}
    return found


def classes_per_batch(args, folder: Path) -> dict:
    "How many classes a batch of training has, and how many it would have if every image were drawn from all."
    data = latents.LatentDataset(folder)
    order = latents.WindowOrder(len(data), args.batch_size, 0)
    seen = [len(data.y[order.indices(step)].unique()) for step in range(args.steps)]
    shares = data.y.bincount()/len(data)
    return {'found': sum(seen)/len(seen), 'expected': (1 - (1 - shares)**args.batch_size).sum().item()}


def clocks(run: Path) -> dict:
    "Seconds per phase, of all starts together and of the slowest process in each; most memory of a process."
    rows = [(f.stem.split('-')[0], json.loads(f.read_text())) for f in sorted((run/'clock').glob('*.json'))]
    seconds = Counter()
    for name in {n for n, _ in rows}:
        for phase, _, _ in PHASES: seconds[phase] += max(r['seconds'].get(phase, 0.) for n, r in rows if n == name)
    return {'seconds': {k: round(seconds[k], 1) for k, _, _ in PHASES}, 'peak_mib': max(r['peak_mib'] for _, r in rows)}


def figures(args, left: dict) -> dict:
    "What is printed and kept."
    a, b = (args.out/name/'comparison' for name in ('interrupted', 'whole'))
    now = {f.name: f.stat().st_mtime_ns for f in a.glob('latents/*.safetensors')}
    files = [f for f in a.rglob('*') if f.is_file()]
    found = difference(args, a, b)
    return {
        'preset': args.preset, 'environment': environment([0]),
        'several processes, interrupted': clocks(a.parent), 'one process': clocks(b.parent),
        'left': {phase: what | {'latents': sorted(what['latents'])} for phase, what in left.items()},
        'kept shards of latents': all(now.get(k) == t for k, t in left[args.stops[0]]['latents'].items()),
        'files': len(files), 'mib_on_disk': round(sum(f.stat().st_size for f in files)/2**20, 1),
        'classes_per_batch': classes_per_batch(args, b/'latents'),
        'apart': found, 'limits': LIMITS, 'equal': all(found[k] <= v for k, v in LIMITS.items()),
    }


def show(result: dict):
    "The figures as lines."
    for name in ('several processes, interrupted', 'one process'):
        seconds = ', '.join(f'{k} {v:.1f} s' for k, v in result[name]['seconds'].items())
        print(f'{name}: {seconds}; at most {result[name]["peak_mib"]} MiB a process')
    print(f'{result["files"]} files, {result["mib_on_disk"]} MiB on disk')
    print('classes per batch: {found:.1f}, of independent draws {expected:.1f}'.format(**result['classes_per_batch']))
    for k, v in result['apart'].items():
        print(f'resumed and undisturbed are apart by {v:.1e} in {k}, at most {result["limits"][k]:.0e}')
    print('equal' if result['equal'] else 'NOT EQUAL')


def options() -> argparse.Namespace:
    "What was asked for."
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=Path('runs/dry_run'), help='folder that is made')
    known = [k for k, p in PRESETS.items() if p.tokenizer == 'flux2']
    parser.add_argument('--preset', choices=known, default=known[0], help=f'(default {known[0]})')
    parser.add_argument('--eager', action='store_true', help='leave out torch.compile')
    parser.add_argument('--precision', choices=['float32', 'bf16'], help="in place of the preset's")
    parser.add_argument('--stops', nargs='+', choices=STOPS, default=[*STOPS], help='where it is cut off, in this order')
    parser.add_argument('--extractor', choices=['inception', 'efficientnet'], default='inception')
    parser.add_argument('--guidances', type=float, nargs='+', default=[1., 1.5])
    parser.add_argument('--metrics', nargs='+', choices=fidelity.METRICS, default=fidelity.METRICS)
    for name, value, text in (
        ('images', 2000, 'images'), ('classes', 1000, 'classes'), ('size', 256, 'side of the images in pixels'),
        ('width', 16, "channels of the autoencoder's first stage; published: 128"),
        ('layers', 1, 'of SiT; published: 12 or 28'),
        ('steps', 40, 'of training'), ('batch_size', 16, 'images a step'), ('samples', 64, 'for the final metrics'),
        ('curve_samples', 32, 'for a point of the curve'), ('solver_steps', 8, 'of a sample'),
        ('processes', 2, 'of the comparison that is cut off')):
        parser.add_argument(f'--{name}', type=int, default=value, help=f'{text} (default {value})')
    parser.add_argument('--into', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--cut_off', default='finish', help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    "Make the material, cut off and resume, make it once more undisturbed, compare."
    args = options()
    if args.into:
        rehearse(args)
        return
    if args.processes < 2: sys.exit('one process has none to lose: give --processes 2 or more')
    if args.steps <= 10: sys.exit('processes agree to stop at every tenth step at the latest: give --steps 11 or more')
    if (args.out/'interrupted').exists(): sys.exit(f'{args.out} holds a dry run: choose another folder')
    env = material(args)
    left = interrupted(args, env)
    undisturbed(args, env)
    result = figures(args, left)
    write_json(args.out/'dry_run.json', result)
    show(result)
    sys.exit(not result['equal'])


if __name__ == '__main__': main()
