"""The study of real tokenizers on real photographs: TAEF2 behind chapters 01, 05 and 06, its family in a tutorial.

    python scripts/study_taef2.py                      everything, about three hours on two CPU cores
    python scripts/study_taef2.py --stages probes      one stage
    python scripts/study_taef2.py --scale 0.01 --out DIR   a tiny rehearsal elsewhere

The folder MATERIAL holds what cannot be shipped: taef2/taef2_{encoder,decoder}.safetensors, cifar10_{train,test}.parquet and
imagenet_samples_256.parquet (columns image and label); for the stage `family` also FAMILY_{encoder,decoder}.safetensors in
a folder `weights`. What was finished in RUNS is reused.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from spherical_lfm.concentration import isotropic_pair, token_norm
from spherical_lfm.decoder import reconstruction_metrics
from spherical_lfm.engine.files import atomic_write, claim_file, write_json
from spherical_lfm.engine.images import ImageSource, to_uint8
from spherical_lfm.engine.report import environment
from spherical_lfm.probes import (
    equal_displacement,
    find_partners,
    probe_swaps,
    sensitivity,
    summarise_swaps,
    swap_displacement,
)
from spherical_lfm.sphere import project, slerp
from spherical_lfm.tokenizers import Tokenizer, load_tokenizer, measure_statistics, standardise
from spherical_lfm.tools.studies import TokenStatistics

ROOT = Path(__file__).resolve().parent.parent
#: Small and large photographs: file and side in pixels.
PHOTOGRAPHS = {'CIFAR-10 64 px': ('cifar10_test.parquet', 64), 'ImageNet 256 px': ('imagenet_samples_256.parquet', 256)}
BIN = Path(sys.executable).parent


def run(command: str, *args):
    "One of the package's commands, in a process of its own."
    print(command, *args, flush=True)
    subprocess.run([str(BIN/command), *map(str, args)], check=True)


def keep(out: Path, **files):
    "Copy what notebooks read: name=path."
    out.mkdir(parents=True, exist_ok=True)
    targets = {claim_file(out/f'{name}{path.suffix}'): path for name, path in files.items()}
    for target, path in targets.items(): shutil.copyfile(path, target)


def geometry(material: Path, runs: Path, out: Path, scaled):
    "Lengths and paths: digits, and TAEF2 on small and on large photographs."
    folder, count = runs/'analysis', scaled(2048)
    run('slfm_analyze', 'digits', 'digits', '--out', folder, '--size', 16, '--count', count)
    for name, images, size in (('taef2, CIFAR-10 64 px', 'cifar10_train.parquet', 64), ('taef2, ImageNet 256 px', 'imagenet_samples_256.parquet', 256)):
        run('slfm_analyze', material/'taef2', material/images, '--out', folder, '--size', size, '--name', name, '--count', count if size == 64 else scaled(250))
    keep(out, geometry=folder/'analysis.json')


def probes(material: Path, runs: Path, out: Path, scaled):
    "Swaps, sensitivity and layers of length; and two photographs that may be shown."
    run('slfm_probe', material/'taef2', material/'cifar10_test.parquet', '--out', runs/'probe-cifar', '--size', 64, '--count', scaled(1024), '--sensitivity_count', scaled(128))
    run('slfm_probe', material/'taef2', material/'imagenet_samples_256.parquet', '--out', runs/'probe-imagenet', '--count', scaled(250), '--neighbours', 'any', '--sensitivity_count', scaled(32), '--batch_size', 8)
    photos = runs/'photos'
    photos.mkdir(parents=True, exist_ok=True)
    for name in ('china.jpg', 'flower.jpg'): Image.fromarray(load_sample_image(name)).save(photos/name, quality=95)
    shutil.copytree(runs/'probe-imagenet'/'start', runs/'probe-photos'/'start', dirs_exist_ok=True) # two photographs are too few for statistics
    run('slfm_probe', material/'taef2', photos, '--out', runs/'probe-photos', '--neighbours', 'any', '--distances', 'pixel', '--sensitivity_count', 2)
    keep(out, probe_cifar10=runs/'probe-cifar'/'probe.json', probe_imagenet=runs/'probe-imagenet'/'probe.json', probe_cifar10_strip=runs/'probe-cifar'/'strip.png', probe_photos_strip=runs/'probe-photos'/'strip.png')


def swap_demo(material: Path, runs: Path, out: Path, scaled):
    "A flower whose tokens take over radii, directions or both of a temple in six steps: frames of the slider in chapter 05."
    picture = claim_file(out/'swap_demo.png')
    record = claim_file(out/'swap_demo.json')
    plain, source = load_tokenizer(material/'taef2'), ImageSource(material/'imagenet_samples_256.parquet', 256)
    photos = torch.stack([x for x, _ in source.stream(source.shuffled(0), scaled(128))])
    tokenizer = standardise(plain, measure_statistics(plain, photos.split(16)))
    side = 96
    crops = [Image.fromarray(load_sample_image(name)).crop(box).resize((side, side), Image.Resampling.BICUBIC) for name, box in (('flower.jpg', (160, 40, 540, 420)), ('china.jpg', (120, 20, 500, 400)))]
    a, b = (tokenizer.encode(pil_to_tensor(x)[None].float()/127.5 - 1) for x in crops)
    moved = []
    for s in torch.linspace(0, 1, 6):
        radius = (1 - s)*token_norm(a, keepdim=True) + s*token_norm(b, keepdim=True)
        direction = slerp(project(a, 1.), project(b, 1.), s[None])
        moved.append((project(a, 1.)*radius, direction*token_norm(a, keepdim=True), direction*radius))
    rows = [torch.cat(row) for row in zip(*moved)]
    with torch.no_grad(): frames = [torch.cat(list(to_uint8(tokenizer.decode(z))), 2) for z in rows]
    mark = PngInfo()
    mark.add_text('Software', 'spherical_lfm')
    with atomic_write(picture) as f: to_pil_image(torch.cat(frames, 1)).save(f, 'PNG', pnginfo=mark)
    write_json(record, {'environment': environment([0]), 'side': side, 'rows': ['radius', 'direction', 'both'], 'columns': 6})


def projection(material: Path, runs: Path, out: Path, scaled):
    "What projection costs with the original decoder, by the coordinates in which it is done."
    result = {}
    for (name, (file, size)), count in zip(PHOTOGRAPHS.items(), (scaled(512), scaled(48))):
        source, plain = ImageSource(material/file, size), load_tokenizer(material/'taef2')
        photos = torch.stack([x for x, _ in source.stream(source.shuffled(0), count)])
        moments = {pack: measure_statistics(plain, photos.split(16), pack) for pack in (1, 2)}
        coordinates = {'as the encoder emits them': plain, 'standardised, d = 32': standardise(plain, moments[1]), 'standardised, packed 2 x 2, d = 128': standardise(plain, moments[2], 2, unpack=False)}
        result[name] = {'original': reconstruction_metrics(plain, photos, batch_size=16)}
        for which, t in coordinates.items(): result[name][which] = reconstruction_metrics(Tokenizer(t.autoencoder, t.transform, spherical=True), photos, batch_size=16)
    write_json(runs/'projection.json', {'reconstruction': result, 'environment': environment([0])})
    keep(out, projection=runs/'projection.json')


def shape_of(z: torch.Tensor) -> dict:
    "Norms and the linear path of tokens, beside that of isotropic tokens which share no more than mean radius and CV."
    d, times = z.shape[1], torch.linspace(0, 1, 33)
    def told(tokens):
        found = TokenStatistics(d, times).update(tokens).summary()
        share = found['paths']['linear']['radial_share']
        return {k: found[k] for k in ('mean_over_sqrt_d', 'cv', 'excursion_sigma')} | {'share': [share[k] for k in (0, 16, 32)]}
    seen = told(z)
    alone = told(isotropic_pair(d, seen['mean_over_sqrt_d'], seen['cv'], 40_000)[1])
    return seen | {f'expected_{k}': alone[k] for k in ('excursion_sigma', 'share')}


@torch.no_grad()
def portrait(plain: Tokenizer, source: ImageSource, count: int) -> dict:
    "Tokens as the encoder emits them and standardised; swaps, sensitivity, and the cost of projection, standardised, with the original decoder."
    order = source.shuffled(0)[:count]
    images = torch.stack([x for x, _ in source.stream(order, count)])
    standard = standardise(plain, measure_statistics(plain, images.split(16)))
    z = torch.cat([standard.encode(x) for x in images.split(16)])
    anchors, partner = find_partners(source.labels[order], torch.Generator().manual_seed(0), 'class' if source.labels[order].bincount().min() > 1 else 'any')
    projected = Tokenizer(standard.autoencoder, standard.transform, spherical=True)
    return {'d': z.shape[1], 'images': len(images), 'tokens': z.numel()//z.shape[1],
            'raw': shape_of(torch.cat([plain.raw_latents(x) for x in images.split(16)])), 'standardised': shape_of(z),
            'swaps': summarise_swaps(probe_swaps(standard, z, anchors, partner, batch_size=16))['pixel']['mean'], 'token_moves': swap_displacement(z, anchors, partner),
            'psnr': {name: reconstruction_metrics(t, images, batch_size=16)['psnr'] for name, t in (('original', standard), ('projected', projected))},
            'scaled_over_rotated': equal_displacement(sensitivity(standard, z[:max(1, count//8)], batch_size=16))['scaled']}


#: The TAESD family: names of its files, from few channels to many.
FAMILY = 'taesd', 'taesdxl', 'taesd3', 'taef1', 'taef2'


def family(material: Path, runs: Path, out: Path, scaled):
    "Five tokenizers of one family with 4, 4, 16, 16 and 32 channels, on small and on large photographs."
    rows = []
    for (images, (file, size)), count in zip(PHOTOGRAPHS.items(), (scaled(256), scaled(32))):
        source = ImageSource(material/file, size)
        for name in FAMILY:
            print(f'{name}, {images}', flush=True)
            rows.append({'tokenizer': name, 'of': images} | portrait(load_tokenizer(material/'weights'/f'{name}_encoder.safetensors'), source, count))
    write_json(claim_file(out/'family.json'), {'rows': rows, 'environment': environment([0])})


def decoder(material: Path, runs: Path, out: Path, scaled):
    "The decoder for the sphere and its control on CIFAR-10 at 64 px."
    run('slfm_finetune', material/'taef2', material/'cifar10_train.parquet', runs/'cifar-taef2', '--held_out', material/'cifar10_test.parquet', '--held_out_count', scaled(1024), '--size', 64,
        '--steps', scaled(2500), '--batch_size', 8, '--perceptual', 'efficientnet', '--discriminator_start', scaled(1500), '--checkpoint_every', scaled(250))
    keep(out, decoder_cifar10=runs/'cifar-taef2'/'evaluation.json', decoder_cifar10_strip=runs/'cifar-taef2'/'strip.png')


def bench(material: Path, runs: Path, out: Path, scaled):
    "What streaming costs beside the encoder."
    run('slfm_bench', 'tokenizer', '--tokenizer', material/'taef2', '--images', material/'cifar10_train.parquet', '--size', 64, '--count', scaled(256), '--out', runs/'bench_tokenizer.json')
    keep(out, bench_tokenizer=runs/'bench_tokenizer.json')


STAGES = {f.__name__: f for f in (geometry, probes, swap_demo, projection, family, decoder, bench)}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--material', type=Path, default=Path('material'), help='folder with weights and photographs')
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='folder for runs')
    parser.add_argument('--out', type=Path, default=ROOT/'data'/'results', help='folder for what notebooks read')
    parser.add_argument('--scale', type=float, default=1., help='fraction of images and steps')
    parser.add_argument('--stages', nargs='+', choices=STAGES, default=list(STAGES), help='which parts, in this order')
    args = parser.parse_args()
    wanted = ['taef2/taef2_encoder.safetensors', 'taef2/taef2_decoder.safetensors', 'cifar10_train.parquet', 'cifar10_test.parquet', 'imagenet_samples_256.parquet']
    if 'family' in args.stages: wanted += [f'weights/{n}_{part}.safetensors' for n in FAMILY for part in ('encoder', 'decoder')]
    missing = [n for n in wanted if not (args.material/n).exists()]
    if missing: sys.exit(f'{args.material} lacks {", ".join(missing)}')
    for stage in args.stages: STAGES[stage](args.material, args.runs, args.out, lambda n: max(4, round(n*args.scale)))
