"""Train what lies in `data/`: the digits tokenizer, the digit features, the finetuned decoders, and the stored results.

    python scripts/make_data.py                     everything, about five hours on two CPU cores
    python scripts/make_data.py --stages tokenizer  one stage
    python scripts/make_data.py --out DIR --scale 0.01   a tiny rehearsal elsewhere
"""
import argparse
from pathlib import Path

from spherical_lfm import tokenizers as tk
from spherical_lfm.engine import images as images_module


def scaled(steps: int, scale: float) -> int:
    "Number of steps at a fraction of the full training."
    return max(2, round(steps*scale))


def tokenizer(out: Path, scale: float):
    "The vanilla digits autoencoder, standardised."
    tk.train_digits_tokenizer(steps=scaled(1500, scale)).save_pretrained(out/'digits'/'vanilla')


def features(out: Path, scale: float):
    "The digit classifier whose features serve as semantic distance and as the extractor for Fréchet distances."
    from spherical_lfm.engine.features import train_digit_features
    train_digit_features(steps=scaled(1500, scale)).save_pretrained(out/'digits'/'features')


def decoders(out: Path, scale: float):
    "The decoder behind the projection, and the equally finetuned vanilla control."
    from spherical_lfm.decoder import FinetuneConfig, finetune_decoder
    images, _ = images_module.digits_images('train')
    for name, spherical in (('spherical', True), ('control', False)):
        start = tk.load_tokenizer(out/'digits'/'vanilla', spherical=spherical)
        config = FinetuneConfig(steps=scaled(1500, scale), batch_size=64, lr=5e-4, discriminator_start=scaled(750, scale),
                                perceptual='none')
        tuned, _ = finetune_decoder(start, images, config)
        tuned.save_pretrained(out/'digits'/name)


def results(out: Path, scale: float):
    "The matched comparison of the four arms over three seeds; a rehearsal takes one."
    from spherical_lfm.tools.studies import seeds_study
    seeds_study(out/'results'/'digits_comparison.json', (0, 1, 2) if scale == 1 else (0,), scale)


def prediction(out: Path, scale: float):
    "What the network predicts, changed in all arms; runs stay in `runs/prediction` beside the folder."
    from spherical_lfm.tools.studies import PREDICTIONS, prediction_study
    few = {} if scale == 1 else dict(seeds=(0,), variants=PREDICTIONS[3::4]) # a rehearsal
    prediction_study(out/'results'/'digits_prediction.json', out.parent/'runs'/'prediction', scale=scale, **few)


def speed(out: Path, scale: float):
    "The runs of that stage at other speeds."
    from spherical_lfm.tools.studies import speed_study
    few = {} if scale == 1 else dict(seeds=(0,), variants=[('spherical-slerp', {})]) # a rehearsal
    speed_study(out/'results'/'digits_speed.json', out.parent/'runs'/'prediction', scale=scale, **few)


def few_steps(out: Path, scale: float):
    "Flow maps against solvers, on the digits; runs stay in `runs/few-steps` beside the folder."
    from spherical_lfm.tools.studies import few_steps_study
    few = {} if scale == 1 else dict(seeds=(0,), ways=('velocity', 'started-map'), budgets=(1,)) # a rehearsal
    few_steps_study(out/'results'/'digits_few_steps.json', out.parent/'runs'/'few-steps', scale=scale, **few)


def solvers(out: Path, scale: float):
    "Fréchet distance against evaluations of the network for every solver."
    from spherical_lfm.tools.studies import solver_study
    few = {} if scale == 1 else dict(budgets=(4, 8), tolerances=(.3,)) # a rehearsal
    solver_study(out/'results'/'digits_solvers.json', scale=scale, **few)


def evolution(out: Path, scale: float):
    "Samples on their way from noise to image, on the linear path and on slerp."
    from spherical_lfm.tools.studies import evolution_study
    evolution_study(out/'results'/'digits_evolution.png', scale=scale)


STAGES = {f.__name__: f for f in (tokenizer, features, decoders, results, prediction, speed, few_steps, solvers, evolution)}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=Path(__file__).resolve().parent.parent/'data', help='folder to write to')
    parser.add_argument('--scale', type=float, default=1., help='fraction of the full number of steps')
    parser.add_argument('--stages', nargs='+', choices=STAGES, default=list(STAGES), help='which parts, in this order')
    args = parser.parse_args()
    for stage in args.stages:
        print(f'stage {stage}', flush=True)
        STAGES[stage](args.out, args.scale)
