"""Draw the pictures of the first page into nbs/images, from the package's own paths.

sphere.svg: linear path and slerp on an ordinary sphere, animated. arc.png: token norms and radial shares along the four arms, on digits.
samples.png: the stored picture of digits on their way from noise.
"""
import shutil
from math import cos, pi, sin
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from spherical_lfm.concentration import path_norms, token_norm
from spherical_lfm.engine.files import atomic_write
from spherical_lfm.engine.images import digits_images
from spherical_lfm.engine.plots import plot_path_norms, plot_radial_share
from spherical_lfm.engine.weights import DATA
from spherical_lfm.paths import ARMS, LinearPath, SlerpPath
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer

IMAGES = Path(__file__).resolve().parent.parent/'nbs'/'images'
COLOUR, DASH = {'chord': '#0072B2', 'arc': '#D55E00'}, {'chord': '7 4', 'arc': 'none'}
VIEW = torch.tensor([[.97, 0., .24], [-.05, .98, .2]])  # an orthographic view


def flat(z) -> list: # [x, y] on the page
    "A point of space as seen."
    return (VIEW@torch.as_tensor(z).view(3)*torch.tensor([120., -120.]) + 150).tolist()


def moving(attribute: str, values) -> str:
    "An attribute that runs through values, for ever."
    return f'<animate attributeName="{attribute}" dur="6s" repeatCount="indefinite" values="{";".join(f"{v:.1f}" for v in values)}"/>'


def polyline(points, style: str) -> str:
    "A line through points of the page."
    return f'<polyline fill="none" {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def wires() -> list:
    "Circles of latitude and longitude."
    angles = [2*pi*k/60 for k in range(61)]
    rings = [[[cos(b)*cos(a), sin(b), cos(b)*sin(a)] for a in angles] for b in (-1., -.5, 0., .5, 1.)]
    rings += [[[sin(a)*cos(b), cos(a), sin(a)*sin(b)] for a in angles] for b in (0., .6, 1.2, 1.8, 2.4)]
    return [polyline(map(flat, ring), 'stroke="#1f2328" stroke-opacity=".15"') for ring in rings] + ['<circle cx="150" cy="150" r="120" fill="none" stroke="#1f2328" stroke-opacity=".5"/>']


def travel(name: str, path, ends: tuple, times: torch.Tensor) -> list:
    "A path, a dot that follows it with its velocity, and its norm over time."
    points = [path.interpolate(*ends, t.view(1)) for t in times]
    at, tip = [flat(z) for z, _ in points], [flat(z + .3*v) for z, v in points]
    graph = [(360 + 260*t, 250 - 180*token_norm(z).item()) for t, (z, _) in zip(times.tolist(), points)]
    style = f'stroke="{COLOUR[name]}" stroke-width="2.5"'
    arrow = ''.join(moving(k, v) for k, v in zip(('x1', 'y1', 'x2', 'y2'), (*zip(*at), *zip(*tip))))
    dots = [f'<circle r="5.5" fill="{COLOUR[name]}">{moving("cx", x)}{moving("cy", y)}</circle>' for x, y in (zip(*at), zip(*graph))]
    return [polyline(line, f'{style} stroke-dasharray="{DASH[name]}"') for line in (at, graph)] + [f'<line {style} marker-end="url(#{name})">{arrow}</line>', *dots]


def sphere() -> str:
    "The animated picture, as SVG."
    ends = tuple(project(torch.tensor(x), 1., dim=0).view(1, 3, 1, 1) for x in ([-.9, .3, .3], [.75, .45, .5]))
    times, body = torch.linspace(0, 1, 61), wires()
    for name, path in (('chord', LinearPath()), ('arc', SlerpPath())): body += travel(name, path, ends, times)
    for z, name, dx in zip(ends, ('noise', 'data'), (-45, 10)):
        x, y = flat(z)
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#57606a"/><text x="{x + dx:.1f}" y="{y - 8:.1f}">{name}</text>')
    body.append('<path d="M360 40V250H630" fill="none" stroke="#57606a"/>')
    body += [f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in ((338, 75, 'R'), (338, 254, '0'), (460, 275, 'time t'), (340, 28, 'norm of the token'), (575, 62, 'slerp'), (465, 165, 'linear'))]
    markers = ''.join(f'<marker id="{n}" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="5" markerHeight="5" orient="auto"><path d="M0 0L8 4L0 8z" fill="{c}"/></marker>' for n, c in COLOUR.items())
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 650 300" font-family="system-ui,sans-serif" font-size="14" fill="#1f2328"><title>Linear path and slerp on a sphere</title>'
            f'<defs>{markers}</defs><rect width="650" height="300" fill="#fff"/>' + '\n'.join(body) + '</svg>\n')


def curves():
    "Lengths and radial shares along the four arms, from noise to digits, as a figure."
    z1 = load_tokenizer('digits').encode(digits_images()[0])
    noise, times = torch.randn(z1.shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 33)
    found = {n: path_norms(p.interpolate, project(noise) if p.spherical else noise, project(z1) if p.spherical else z1, times) for n, p in ARMS.items()}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3), layout='constrained')
    plot_path_norms({n: (times, c) for n, c in found.items()}, 16, left)
    plot_radial_share({n: (times, c['radial_share']) for n, c in found.items()}, ax=right)
    return fig


if __name__ == '__main__':
    with atomic_write(IMAGES/'sphere.svg') as f: f.write_text(sphere())
    with atomic_write(IMAGES/'arc.png') as f: curves().savefig(f, format='png', dpi=90)
    with atomic_write(IMAGES/'samples.png') as f: shutil.copyfile(DATA/'results'/'digits_evolution.png', f)
