"""The matched experiment on photographs behind chapter 12: CIFAR-10 at 64 px through TAEF2, the four arms and what the paper's last row confounds.

    python scripts/study_cifar.py                                    on a GPU: preset cifar10-taef2
    python scripts/study_cifar.py --short --deadline 420             on a GPU that is there for minutes: 2,500 steps, 5,000 samples
    python scripts/study_cifar.py --preset cifar10-taef2-small --workers 2   on two CPU cores
    python scripts/study_cifar.py --preset cifar10-taef2-small --scale 0.01 --out DIR   a tiny rehearsal

MATERIAL holds cifar10_train.parquet (columns image and label); DECODERS is what slfm_finetune left: spherical/tokenizer and
control/tokenizer (scripts/study_taef2.py, stage decoder). What was finished in RUNS is reused. Results go to OUT.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from spherical_lfm.engine.features import all_parts, extract_features
from spherical_lfm.engine.files import atomic_write, claim_file, write_json
from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.latents import LatentDataset
from spherical_lfm.engine.processes import default_device
from spherical_lfm.engine.report import environment
from spherical_lfm.experiments import (
    class_mixture,
    comparison_table,
    decoder_name,
    get_preset,
    prepare_latents,
    prepare_reference,
    run_arm,
    score,
    steps_to_reach,
)
from spherical_lfm.fidelity import score_features
from spherical_lfm.paths import ARMS, arm_path
from spherical_lfm.sampling import _path_settings, load_run

ROOT = Path(__file__).resolve().parent.parent
RAW = 'spherical-slerp without projection'
ENDS = 'vanilla-linear', 'spherical-slerp'
COUNTS = (5, 10, 25, 50, 250)
SHORT = dict(steps=2500, lr=5e-4, warmup=250, ema_decay=.998, checkpoint_every=2500) # a twentieth of the steps of cifar10-taef2, chosen before any run


def setting(args):
    "Preset with local decoders, at the wanted scale, and the images."
    preset, scaled = get_preset(args.preset), lambda n: max(2, round(n*args.scale))
    preset = replace(preset, tokenizer=str(args.decoders/'spherical'/'tokenizer'), control=str(args.decoders/'control'/'tokenizer'))
    if args.short: preset = replace(preset, train=preset.train | SHORT, samples=5000, curve_samples=5000, reference_count=10_000, guidances=(1.,), metrics=('fid', 'kid'))
    if args.scale != 1:
        train = preset.train | dict(steps=3*scaled(preset.train['steps']//3), checkpoint_every=scaled(preset.train['steps']//3), log_every=1)
        few = max(20, scaled(preset.samples))
        preset = replace(preset, train=train, samples=few, curve_samples=few, reference_count=max(40, scaled(preset.reference_count or 50_000)), sampler=replace(preset.sampler, steps=max(2, scaled(preset.sampler.steps))))
    images = args.material/'cifar10_train.parquet'
    if args.scale != 1:
        table, images = pq.read_table(images), args.runs/images.name
        if not images.exists():
            with atomic_write(images) as f: pq.write_table(table.slice(0, max(200, scaled(len(table)))), f)
    return preset, ImageSource(images, preset.image_size)


def folder(args, arm: str, seed: int) -> Path: return args.runs/f'{arm.replace(" ", "-")}-{seed}'


def floor(preset, source: ImageSource, runs: Path) -> dict:
    "Real images against other real images, as many of them as samples are scored: what a perfect generator would get."
    count = preset.reference_count or len(source)//2 # where all are the reference, one half against the other
    reference = prepare_reference(replace(preset, reference_count=count), source, runs)
    order = source.shuffled(0)[count:][:preset.samples] # the reference is the beginning of this order
    found = extract_features((x for x, _ in source.batches(64, order)), preset.extractor, parts=all_parts(preset.extractor))
    return score_features(found, reference, preset.metrics, extractor=preset.extractor) | {'samples': len(found['features']), 'reference_count': reference['count']}


def job(args, name: str):
    "One piece of work in this process; its result is a JSON file in RUNS."
    kind, *what = name.split(':')
    preset, source = setting(args)
    store = args.runs/'results'/f'{name.replace(":", "_").replace(" ", "-")}.json'
    if store.exists(): return
    if kind == 'prepare':
        prepare_latents(preset, source, args.runs/'latents')
        return
    if kind == 'reference':
        prepare_reference(preset, source, args.runs)
        return
    if kind == 'floor':
        write_json(store, floor(preset, source, args.runs) | {'commit': environment()['commit']})
        return
    reference, latents = prepare_reference(preset, source, args.runs), args.runs/'latents'
    labels = LatentDataset(latents).y
    arm, seed = what[0], int(what[1])
    base, run = 'spherical-slerp' if arm == RAW else arm, folder(args, arm, seed)
    steps = preset.train['steps']
    quick = replace(preset, metrics=('fid', 'kid'))
    sampler = replace(preset.sampler, guidance=preset.guidances[0], seed=seed)
    if kind == 'train':
        if arm == RAW: preset = replace(preset, train=preset.train | {'project_velocity': False})
        result = run_arm(preset, base, latents, reference, run, seed, curve=seed == 0 and arm != RAW or arm in ENDS) | {'arm': arm, 'seed': seed}
    elif kind == 'sweep':
        n, exponential = int(what[2]), what[3] == 'exponential'
        drawn = load_run(run, steps, default_device())
        if not exponential: drawn = drawn._replace(path=arm_path(**_path_settings(drawn.record['config']), exponential=False))
        found = score(run, drawn, quick, reference, class_mixture(labels, preset.curve_samples//2), replace(sampler, steps=n))
        result = {'arm': arm, 'seed': seed, 'steps': n, 'exponential': exponential, **found}
    elif kind == 'swap':
        other = decoder_name(preset, 'vanilla-linear' if ARMS[base].spherical else 'spherical-slerp')
        found = score(run, load_run(run, steps, default_device()), quick, reference, class_mixture(labels, preset.curve_samples), sampler, other)
        result = {'arm': arm, 'seed': seed, 'decoder': Path(other).parent.name, **found}
    write_json(store, result | {'commit': environment()['commit']})


def plan(args) -> dict:
    "All jobs, stage by stage."
    seeds = range(args.seeds)
    return {
        'latents': ['prepare'],
        'reference': ['reference'],
        'floor': ['floor'],
        'train': [f'train:{arm}:{s}' for s in seeds for arm in ENDS] + [f'train:{RAW}:0'] + [f'train:{arm}:{s}' for s in seeds for arm in ('spherical-linear', 'vanilla-shell')],
        'sweep': [f'sweep:{arm}:0:{n}:{how}' for n in COUNTS for arm in ('spherical-slerp', RAW) for how in ('exponential', 'renormalise')],
        'swap': [f'swap:{arm}:{s}' for s in seeds for arm in ARMS],
    }


def collect(args):
    "Everything in one file, and a grid of samples per arm."
    preset, _ = setting(args)
    found = {k: [json.loads(f.read_text()) for f in sorted((args.runs/'results').glob(f'{k}_*.json'))] for k in ('train', 'sweep', 'swap')}
    found['floor'] = json.loads((args.runs/'results'/'floor.json').read_text())
    commits = {r['commit'] for r in (found['floor'], *(r for k in ('train', 'sweep', 'swap') for r in found[k]))}
    if len(commits) > 1 or any(c and c.endswith('-dirty') for c in commits): sys.exit(f'jobs were run at several commits, or with uncommitted changes ({", ".join(map(str, commits))}): run the study again at one')
    rows = found.pop('train')
    of = lambda s: {r['arm']: r for r in rows if r['seed'] == s and r['arm'] != RAW}
    reached = {s: {arm: steps_to_reach(of(s), arm) for arm in of(s)} for s in sorted({r['seed'] for r in rows})}
    curves = {f'{r["arm"]} {r["seed"]}': [{k: line[k] for k in ('step', 'loss_over_power', 'loss_q1', 'loss_q2', 'loss_q3', 'loss_q4', 'data_wait')} for line in map(json.loads, (folder(args, r['arm'], r['seed'])/'log.jsonl').read_text().splitlines()) if 'loss_over_power' in line] for r in rows}
    every = lambda lines: lines[max(0, len(lines)//48 - 1)::max(1, len(lines)//48)]
    described = {k: v for k, v in asdict(preset).items() if k not in ('tokenizer', 'control')}
    name = args.out/f'{args.preset.replace("-", "_")}{"_short"*args.short}.json'
    write_json(claim_file(name), {'rows': rows, 'reached': reached, **found, 'losses': {k: every(v) for k, v in curves.items()}, 'preset': described, 'environment': environment(list(range(args.seeds)))})
    for r in rows:
        grid = folder(args, r['arm'], r['seed'])/'samples.png'
        if r['seed'] == 0 and grid.exists(): shutil.copyfile(grid, claim_file(args.out/f'{name.stem}_{r["arm"].replace(" ", "_").replace("-", "_")}.png'))
    print(comparison_table({f'{r["arm"]} {r["seed"]}': r for r in rows}).to_string(index=False))
    print(f'results in {name}')


def main(args):
    "Stage after stage; several jobs at a time, each in a process of its own, on a CPU."
    began = time.monotonic()
    here = [sys.executable, __file__, *sys.argv[1:]]
    def work(name):
        late = time.monotonic() - began
        if late > args.deadline: return
        print(f'{late:.0f} s: {name}', flush=True)
        if args.workers == 1: return job(args, name) # here: a process begins by compiling
        several = ['-m', 'accelerate.commands.launch', '--cpu', '--num_processes', str(args.workers), '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
        call = [sys.executable, *(several if name == 'prepare' else []), *here[1:], '--job', name]
        subprocess.run(call, check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    for stage, jobs in plan(args).items():
        if stage not in args.stages: continue
        with ThreadPoolExecutor(args.workers) as pool: list((pool.map if args.workers > 1 else map)(work, jobs)) # signals reach the main thread alone
    if 'collect' in args.stages: collect(args)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--preset', default='cifar10-taef2' if torch.cuda.is_available() else 'cifar10-taef2-small', help='cifar10-taef2 or cifar10-taef2-small')
    parser.add_argument('--material', type=Path, default=Path('material'), help='folder with cifar10_train.parquet')
    parser.add_argument('--decoders', type=Path, default=Path('runs/cifar-taef2'), help='what slfm_finetune left')
    parser.add_argument('--runs', type=Path, default=Path('runs/cifar-study'), help='folder for runs')
    parser.add_argument('--out', type=Path, default=ROOT/'data'/'results', help='folder for what notebooks read')
    parser.add_argument('--seeds', type=int, default=2, help='seeds 0 to this minus one')
    parser.add_argument('--workers', type=int, default=1, help='jobs at a time')
    parser.add_argument('--scale', type=float, default=1., help='fraction of steps and samples')
    parser.add_argument('--short', action='store_true', help='2,500 steps and 5,000 samples')
    parser.add_argument('--deadline', type=float, default=float('inf'), help='begin no job after so many seconds, and collect what there is')
    parser.add_argument('--stages', nargs='+', default=['latents', 'reference', 'floor', 'train', 'sweep', 'swap', 'collect'], help='which parts, in this order')
    parser.add_argument('--job', help='one job only, as the script calls itself')
    args = parser.parse_args()
    if not (args.material/'cifar10_train.parquet').exists(): sys.exit(f'{args.material} lacks cifar10_train.parquet')
    if not (args.decoders/'spherical'/'tokenizer').exists(): sys.exit(f'{args.decoders} lacks spherical/tokenizer: run scripts/study_taef2.py --stages decoder, or slfm_finetune')
    if args.job: job(args, args.job)
    else: main(args)
