"""What the prose says, against stored results; what it must not say again."""
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from spherical_lfm.probes import equal_displacement
from spherical_lfm.tools.plan import H100

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('[!.]*.ipynb'))
RESULTS = sorted((ROOT/'data'/'results').glob('*.json'))
sys.path.insert(0, str(ROOT/'scripts'))


def result(name): return json.loads((ROOT/'data'/'results'/f'{name}.json').read_text())


def cells(name, kind):
    found = json.loads((name if isinstance(name, Path) else ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']
    return [''.join(c['source']) for c in found if c['cell_type'] == kind]


def flat(text): return ' '.join(text.split())


DIGITS, PHOTOS, DECODER = result('digits_comparison'), result('cifar10_taef2_small'), result('decoder_cifar10')
PREDICTED = result('digits_prediction')['rows']
SPEED = result('digits_speed')
FAMILY = result('family')['rows']
FEW = result('digits_few_steps')
PROBES = {name: result(f'probe_{name}') for name in ('cifar10', 'imagenet')}


def photo(arm, key='fd', seed=None):
    "Mean over seeds, or one seed, without guidance."
    rows = [r for r in PHOTOS['rows'] if r['arm'] == arm and seed in (None, r['seed'])]
    return mean(r['guided'][0][key] for r in rows)


def few(way, method, n, key='kid', guidance=1.): # mean over seeds, at so many evaluations
    return mean(r[key] for r in FEW['rows'] if (r['way'], r['method'], r['evaluations'], r['guidance']) == (way, method, n, guidance))


def mapped(*counts, way='started-map', key='kid'): return [few(way, 'flow_map', n, key) for n in counts]


def euler(*counts): return [few('velocity', 'euler', n) for n in counts]


def nearer(n): # steps of the map to its own flow than those of Euler
    return few('velocity', 'euler', n, 'apart')/few('started-map', 'flow_map', n, 'apart')


def swapped(arm, key='fd', seed=0): # through the other decoder
    return next(r[key] for r in PHOTOS['swap'] if (r['arm'], r['seed']) == (arm, seed))


def lead(key, seed, decoder=None): # of slerp over vanilla-linear, each through its own decoder or both through one
    linear = swapped(CHORD, key, seed) if decoder == 'spherical' else photo(CHORD, key, seed)
    return linear - (swapped(ARC, key, seed) if decoder == 'control' else photo(ARC, key, seed))


def shares(key): # of the lead that stay with one decoder, in per cent
    found = [100*lead(key, s, d)/lead(key, s) for s in (0, 1) for d in ('control', 'spherical')]
    return min(found), max(found)


def ahead(arm, steps): # KID by which the exponential map is lower than the straight step
    found = {r['exponential']: r['kid'] for r in PHOTOS['sweep'] if (r['arm'], r['steps']) == (arm, steps)}
    return found[False] - found[True]


def family(*names, kind='standardised', key='excursion_sigma'): # smallest and largest of some tokenizers on both kinds of images
    found = [r['psnr']['original'] - r['psnr']['projected'] if key == 'cost' else r['swaps']['radius'][0]/r['swaps']['full'][0] if key == 'swap' else r[kind][key]
             for r in FAMILY if r['tokenizer'] in names]
    return min(found), max(found)


def paced(arm, strength=0., own=False, guidance=1., prediction='velocity', key='kid'): # mean over seeds on digits
    rows = [r for r in SPEED['rows'] if (r['arm'], r['strength'], r['own'], r['guidance'], r.get('prediction', 'velocity')) == (arm, strength, own, guidance, prediction)]
    assert len(rows) == 2
    return mean(r[key] for r in rows)


def apart(arm): # class means at the true speed over those of the data
    return paced(arm, 1., key='between')/SPEED['data']['spherical' if 'spherical' in arm else 'vanilla']['between']


def predicted(arm, key='kid', **settings): # both seeds of a variant on digits, the lower one first
    usual = {'prediction': 'velocity', 'skip': False, 'project_velocity': True}
    return sorted(r[key] for r in PREDICTED if r['arm'] == arm and {k: r.get(k, v) for k, v in usual.items()} == usual | settings)


def told(arm, **settings): return mean(predicted(arm, **settings))


def psnr(pipeline): return DECODER['pipelines'][pipeline]['psnr']


def off(arm): # what guidance takes off, every seed
    guided = [r['guided'] for r in PHOTOS['rows'] if r['arm'] == arm]
    return [none['fd'] - some['fd'] for none, some in guided]


def power(arm): return next(r['loss_over_power'] for r in PHOTOS['rows'] if r['arm'] == arm and r['seed'] == 0)


def scaled(distance='pixel', kind='scaled', up_to=.5): # smallest and largest ratio over both sets of photographs
    found = [equal_displacement(p['sensitivity'], distance, up_to)[kind] for p in PROBES.values()]
    return min(f[0] for f in found), max(f[1] for f in found)


def in_bins():
    ratios = [r['scaled'][0]/r['rotated'][0] for p in PROBES.values() for r in p['response']]
    return min(ratios), max(ratios)


def at_one(kind): # semantic distance of lengthened over rotated tokens at displacement 1
    ratios = []
    for p in PROBES.values():
        turned = sorted((r['displacement'], r['efficientnet'][0]) for r in p['sensitivity'] if r['kind'] == 'rotated')
        at = [r for r in p['sensitivity'] if r['kind'] == kind and abs(r['displacement'] - 1) < 1e-6]
        y = at[0]['efficientnet'][0]
        ratios.append(y/np.interp(1., *zip(*turned)))
    return min(ratios), max(ratios)


ARC, SHELL, SPHERE, CHORD = 'spherical-slerp', 'vanilla-shell', 'spherical-linear', 'vanilla-linear'
BENCH = result('bench_train')
B2, XL2, ON_GPU = result('gpu_train_b2'), result('gpu_train_xl2'), result('gpu_tests')['counts']
SOLVERS = {(r['method'], r['evaluations']): r['fd'] for r in result('digits_solvers')['rows']}
LAST = [SOLVERS[m, max(n for k, n in SOLVERS if k == m)] for m in ('heun', 'rk4', 'adams2', 'adams3', 'adaptive')]
GUIDED = [v for arm in (ARC, SHELL, SPHERE, CHORD) for v in off(arm)]
CLAIMS = [ # (notebook, sentence with its numbers left out, the numbers)
    ('05_probes', 'scaling all tokens changes pixels {:.1f} to {:.1f} times as much as rotating them', scaled()),
    ('05_probes', 'scaling one bin of radii {:.1f} to {:.1f} times as much', in_bins()),
    ('05_probes', 'shortening is {:.1f} to {:.1f} times *worse* than rotating', scaled('efficientnet', 'shorter', 1.)),
    ('05_probes', 'while it is small ({:.1f} to {:.1f} times as much', scaled('efficientnet', 'longer', .2)),
    ('05_probes', 'when it is large ({:.1f} to {:.1f} times at 1)', at_one('longer')),
    ('08_training', 'the median of five pairwise ratios is {:.3f}', (BENCH['slerp_over_linear'],)),
    ('08_training', '({:,.0f} ms for slerp, {:,.0f} ms for linear)',
     [BENCH['ms_per_step'][path] for path in ('slerp', 'linear')]),
    ('08_training', 'costs what the straight path costs ({:.3f} of it', (B2['slerp_over_linear'],)),
    ('08_training', 'a step of ours is {:.1f} and {:.1f} times as fast', (B2['plain_over_ours'], XL2['plain_over_ours'])),
    ('08_training', 'take {:.0f} of the {:.0f} ms of SiT-XL/2', (XL2['ms_per_step']['optimiser'], XL2['ms_per_step']['slerp'])),
    ('tools/plan', 'compiled, {:.0f} TFLOP/s for SiT-B/2 and {:.0f} for SiT-XL/2, which is {:.2f} and {:.2f} of', (B2['tflops'], XL2['tflops'], B2['tflops']/989, XL2['tflops']/989)),
    ('tools/plan', 'without `torch.compile`, which had {:.2f}', (B2['tflops']*B2['compiled_over_eager']/989,)),
    ('cluster', '{:.1f} for training, which is what one H100 gave, and {:.2f} for the rest', (H100.training_mfu, H100.other_mfu)),
    ('cluster', 'on an H100, {} of {} (', (ON_GPU['passed'], sum(ON_GPU.values()))),
    ('index', 'the tests for CUDA ran ({} of {},', (ON_GPU['passed'], sum(ON_GPU.values()))),
    ('10_solvers', 'arrive at {:.2f} to {:.2f}', (min(LAST), max(LAST))),
    ('10_solvers', 'tried, is at {:.2f}', (SOLVERS['euler', 64],)),
    ('12_experiments', 'score higher against them ({:.2f})', (DIGITS['held_out_fd'],)),
    ('12_experiments', 'is {:.3f} for the held-out digits', (DIGITS['held_out_kid'],)),
    ('12_experiments', 'slerp (KID {:.3f}, distance {:.0f}), shell ({:.3f}, {:.0f}), '
     'spherical-linear ({:.3f}, {:.0f}), linear ({:.3f}, {:.0f})',
     [photo(arm, key) for arm in (ARC, SHELL, SPHERE, CHORD) for key in ('kid', 'fd')]),
    ('12_experiments', 'in both seeds, {:.3f} against {:.3f} for vanilla-linear',
     [photo(arm, 'kid') for arm in (ARC, CHORD)]),
    ('12_experiments', 'The KIDs are {:.3f} apart', (photo(CHORD, 'kid') - photo(ARC, 'kid'),)),
    ('12_experiments', 'Their KIDs are {:.3f} apart', (photo(SPHERE, 'kid') - photo(SHELL, 'kid'),)),
    ('13_prediction', 'Slerp stays first by the mean (KID {:.3f}, vanilla-linear {:.3f}, spherical-linear {:.3f}, shell {:.3f}), but with data even vanilla-linear is ahead of slerp with velocities ({:.3f})',
     (*(told(arm, prediction='data') for arm in (ARC, CHORD, SPHERE, SHELL)), told(ARC))),
    ('13_prediction', 'takes vanilla-linear from {:.3f} to {:.3f} (means), {:.0f} % of the way to slerp\'s {:.3f}',
     (told(CHORD), told(CHORD, skip=True), 100*(told(CHORD) - told(CHORD, skip=True))/(told(CHORD) - told(ARC)), told(ARC))),
    ('13_prediction', 'Spherical-linear with a skip, at {:.3f}, is ahead', (told(SPHERE, skip=True),)),
    ('13_prediction', 'the least in proportion ({:.3f} to {:.3f})', (told(SHELL), told(SHELL, skip=True))),
    ('13_prediction', 'takes vanilla-linear to {:.3f} and slerp to {:.3f}. Slerp gains as well', (told(CHORD, prediction='data'), told(ARC, prediction='data'))),
    ('13_prediction', 'are far apart ({:.3f} and {:.3f})', predicted(CHORD, prediction='data')),
    ('13_prediction', 'slerp is at {:.3f}, behind vanilla-linear. The skip gives it back more than half of what it lost ({:.3f}; with the projection it is {:.3f})',
     (told(ARC, project_velocity=False), told(ARC, project_velocity=False, skip=True), told(ARC))),
    ('14_flow_map', 'samples of KID {:.3f}, where a single Euler step of an ordinary model has {:.3f}. With two evaluations they are close ({:.3f} and {:.3f}), and from four on the ordinary model is ahead ({:.3f} against {:.3f})',
     [v for n in (1, 2, 4) for v in (*mapped(n), *euler(n))]),
    ('14_flow_map', 'from velocities has {:.3f}, half of what a single Euler step has ({:.3f})', (*mapped(1), *euler(1))),
    ('14_flow_map', '{:.3f} against {:.3f} for Euler and {:.3f} for a step of Heun', (*mapped(2), *euler(2), few('velocity', 'heun', 2))),
    ('14_flow_map', 'with Euler {:.3f} at four and {:.3f} at eight, with Adams {:.3f} and {:.3f}; the map has {:.3f} and {:.3f}',
     (*euler(4, 8), *(few('velocity', 'adams2', n) for n in (4, 8)), *mapped(4, 8))),
    ('14_flow_map', 'a single step of Heun ({:.3f} at one, {:.3f} at four)', mapped(1, 4, way='map')),
    ('14_flow_map', 'a KID of {:.3f} with one evaluation and {:.3f} with four, and digits', mapped(1, 4, way='started-guided-map')),
    ('14_flow_map', '({:.1f} % against {:.1f} % with one)', [100*v for w in ('started-guided-map', 'started-map') for v in mapped(1, way=w, key='accuracy')]),
    ('14_flow_map', 'has {:.3f} with four steps, which are eight evaluations, and {:.3f} with a hundred', [few('velocity', 'euler', n, guidance=1.5) for n in (8, 100)]),
    ('14_flow_map', 'one evaluation ({:.3f}) is better than eight of the ordinary model ({:.3f}), and four ({:.3f}) than a hundred ({:.3f})',
     (*mapped(1, way='started-guided-map'), few('velocity', 'euler', 8, guidance=1.5), *mapped(4, way='started-guided-map'), few('velocity', 'euler', 100, guidance=1.5))),
    ('14_flow_map', '(held-out digits have {:.3f})', (FEW['held_out_kid'],)),
    ('14_flow_map', 'Its one step is {:.1f} times nearer to its own flow', (nearer(1),)),
    ('14_flow_map', 'its four are {:.1f} times nearer', (nearer(4),)),
    ('14_flow_map', 'the same network has {:.3f}, and the one that learned velocities only {:.3f}', (few('started-map', 'euler', 50), *euler(50))),
    ('tutorial_vae', 'leaves its shells clearly, by {:.1f} to {:.1f} σ', family('taef2')),
    ('tutorial_vae', 'With 16 channels it is {:.1f} to {:.1f} σ', family('taesd3', 'taef1')),
    ('tutorial_vae', 'with 4 channels {:.1f} to {:.1f} (for', family('taesd', 'taesdxl')),
    ('tutorial_vae', 'projection costs {:.1f} to {:.1f} dB', family('taesd', 'taesdxl', 'taesd3', 'taef1', key='cost')),
    ('tutorial_vae', 'against {:.1f} to {:.1f}.', family('taef2', key='cost')),
    ('tutorial_vae', 'have a CV of {:.2f} on CIFAR-10', family('taesd3', kind='raw', key='cv')[:1]),
    ('tutorial_vae', 'widens it to {:.2f}', family('taesd3', key='cv')[:1]),
    ('13_prediction', 'gains again, slerp to {:.3f}, without', (paced(ARC, 1.),)),
    ('13_prediction', 'changes little: {:.3f} to {:.3f} for vanilla-linear, {:.3f} to {:.3f} for slerp', (paced(CHORD), paced(CHORD, 1., True), paced(ARC), paced(ARC, 1., True))),
    ('13_prediction', 'vanilla-linear from {:.3f} to {:.3f}, shell from {:.3f} to {:.3f}, spherical-linear from {:.3f} to {:.3f}, slerp from {:.3f} to {:.3f}. It costs nothing',
     [paced(arm, strength) for arm in (CHORD, SHELL, SPHERE, ARC) for strength in (0., 1.)]),
    ('13_prediction', 'which end {:.1f} to {:.1f} times as far apart', (min(map(apart, (CHORD, SHELL, SPHERE, ARC))), max(map(apart, (CHORD, SHELL, SPHERE, ARC))))),
    ('13_prediction', 'gain more from guidance ({:.3f} and {:.3f}), the spherical', (paced(CHORD, guidance=1.5), paced(SHELL, guidance=1.5))),
    ('13_prediction', 'from {:.0f} to {:.0f} % for vanilla-linear and from {:.0f} to {:.0f} % for slerp', [100*paced(arm, strength, key='accuracy') for arm in (CHORD, ARC) for strength in (0., 1.)]),
    ('13_prediction', 'all four gain (slerp to {:.3f}, the lowest', (paced(ARC, .5, prediction='data'),)),
    ('13_prediction', 'slerp and shell ({:.3f} and {:.3f}), and guidance', (paced(ARC, 1., prediction='data'), paced(SHELL, 1., prediction='data'))),
    ('12_experiments', 'The two seeds differ in KID by {:.4f} for slerp and by {:.3f} for linear',
     [abs(photo(arm, 'kid', 0) - photo(arm, 'kid', 1)) for arm in (ARC, CHORD)]),
    ('12_experiments', 'in Fréchet distance by {:.1f} for slerp and by {:.0f} for linear',
     [abs(photo(arm, seed=0) - photo(arm, seed=1)) for arm in (ARC, CHORD)]),
    ('12_experiments', 'Guidance of 1.5 takes {:.0f} to {:.1f} off', (min(GUIDED), max(GUIDED))),
    ('12_experiments', '({:.1f} dB against {:.1f} dB, chapter 06)',
     [psnr(f'finetuned {decoder}') for decoder in ('spherical', 'control')]),
    ('12_experiments', 'the linear path\'s is the **lower** one ({:.2f} against {:.2f})', (power(CHORD), power(ARC))),
    ('12_experiments', 'slerp is ahead in KID by {:.3f} through the control ({:.3f} against {:.3f}), and by {:.3f} '
     'through the spherical decoder ({:.3f} against {:.3f})',
     (lead('kid', 0, 'control'), photo(CHORD, 'kid', 0), swapped(ARC, 'kid'),
      lead('kid', 0, 'spherical'), swapped(CHORD, 'kid'), photo(ARC, 'kid', 0))),
    ('12_experiments', 'At seed 1 it is ahead by {:.3f} through either', (lead('kid', 1, 'control'),)),
    ('12_experiments', 'At seed 1 it is ahead by {:.3f} through either', (lead('kid', 1, 'spherical'),)),
    ('12_experiments', 'it is ahead by {:.3f} and {:.3f}.', [lead('kid', s) for s in (0, 1)]),
    ('12_experiments', 'So {:.0f} % to {:.0f} % of the lead goes with the flow', shares('kid')),
    ('12_experiments', 'By Fréchet distance it is {:.0f} % to {:.0f} %', shares('fd')),
    ('12_experiments', 'through the spherical decoder ({:.3f} and {:.3f}) is where spherical-linear is ({:.3f} in both)',
     (*(swapped(CHORD, 'kid', s) for s in (0, 1)), photo(SPHERE, 'kid', 1))),
    ('12_experiments', 'have a KID of {:.4f} and a Fréchet distance of {:.0f}', [PHOTOS['floor'][k] for k in ('kid', 'fd')]),
    ('12_experiments', 'it is ahead by {:.4f} at 5 steps', (ahead(ARC, 5),)),
    ('12_experiments', 'it is behind by {:.4f} at 5 steps', (-ahead(f'{ARC} without projection', 5),)),
    ('12_experiments', 'stands at {:.0f} at step 800 and at {:.0f} at step 2,400',
     [next(p['fd'] for r in PHOTOS['rows'] if (r['arm'], r['seed']) == (CHORD, 0) for p in r['curve'] if p['step'] == step)
      for step in (800, 2400)]),
    ('12_experiments', 'takes KID from {:.3f} to {:.3f}; with the projection it is {:.3f}',
     [photo(arm, 'kid', 0) for arm in (SPHERE, f'{ARC} without projection', ARC)]),
    ('12_experiments', 'In Fréchet distance: {:.0f}, {:.0f} and {:.0f}',
     [photo(arm, seed=0) for arm in (SPHERE, f'{ARC} without projection', ARC)]),
    ('12_experiments', 'nearly the same without it ({:.3f}) and with it ({:.3f})',
     [power(f'{ARC} without projection'), power(ARC)]),
    ('tutorial_sit', 'goes from {:.0f} (linear, vanilla) to {:.0f} with data and noise projected (1, 2), '
     'to {:.0f} with slerp *without*',
     (photo(CHORD, seed=0), photo(SPHERE, seed=0), photo(f'{ARC} without projection', seed=0))),
    ('tutorial_sit', 'and to {:.0f} with it (4)', (photo(ARC, seed=0),)),
    ('tutorial_sit', 'vanilla-linear has {:.0f}', (swapped(CHORD),)),
]


@pytest.mark.parametrize('name, sentence, numbers', CLAIMS, ids=lambda v: v[:40] if isinstance(v, str) else '')
def test_numbers_of_the_prose_are_those_of_the_results(name, sentence, numbers):
    assert sentence.format(*numbers) in flat(' '.join(cells(name, 'markdown'))), sentence.format(*numbers)


def test_tables_of_the_readme_are_what_the_results_say():
    "The hidden cells of the index are run on the stored results of today; the README shows what they write."
    hidden = [c for c in cells('index', 'code') if '#| hide' in c and 'colab' not in c]
    code = hidden + [c for c in cells('index', 'code') if '#| echo: false' in c]
    script = '\n'.join(code).replace('\nMarkdown(', '\nprint(').replace('from IPython.display import Markdown', '')
    written = subprocess.run([sys.executable, '-c', script], cwd=ROOT/'nbs', capture_output=True, text=True, timeout=60)
    assert written.returncode == 0, written.stderr
    readme = (ROOT/'README.md').read_text().replace('](nbs/', '](')
    lines = [line for line in written.stdout.splitlines() if line]
    assert len(lines) > 15
    for line in lines: assert line in readme, f'run the index and make readme: {line}'
    digits = [r['fd'] for r in DIGITS['rows'] if r['arm'] == ARC]
    assert f'{mean(digits):.1f} [{min(digits):.1f}, {max(digits):.1f}]' in readme
    assert f'{photo(ARC, "kid"):.3f} [' in readme


def commits(found):
    "Every commit that a result records, at any depth."
    if isinstance(found, dict):
        if isinstance(found.get('commit'), str): yield found['commit']
        found = found.values()
    elif not isinstance(found, list): return
    for inner in found: yield from commits(inner)


@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_stored_results_are_of_a_commit_that_can_be_checked_out(path):
    dirty = {c for c in commits(json.loads(path.read_text())) if c.endswith('-dirty')}
    assert not dirty, f'{path.name} was made from a changed tree ({", ".join(dirty)}): make it anew from a clean one'


def sources():
    "Everything that a reader reads, by the name of its file."
    found = {p.name: '\n'.join(cells(p, 'markdown') + cells(p, 'code')) for p in NOTEBOOKS}
    code = [p for folder in ('spherical_lfm', 'scripts') for p in (ROOT/folder).rglob('[a-z]*.py')]
    others = [ROOT/'README.md', ROOT/'CHANGELOG.md', *code]
    return found | {p.name: p.read_text() for p in others if p.name != 'faults.py'}


REFUTED = ['draws their direction', 'draws directions', 'direction matters', 'hardly looks at', 'hardly misses',
           'barely reads', 'times as much as radius', 'read direction?', 'bound what any flow']


@pytest.mark.parametrize('claim', REFUTED)
def test_refuted_claims_do_not_come_back(claim):
    for name, text in sources().items():
        assert claim not in flat(text), f'{name} says {claim!r}, which chapter 05 refutes'


def test_only_the_distance_with_inception_is_called_fid():
    for name, text in sources().items():
        for line in text.splitlines():
            other = re.search(r'\bs?FID\b', line) and re.search(r'digit|EfficientNet|efficientnet|CIFAR', line)
            assert not other or re.search(r'[Ii]nception|another tokenizer', line), f'{name}: {line.strip()[:200]}'


def settings_folder(tmp_path, published):
    text = re.sub(r'^published = .*$', f'published = {published}', (ROOT/'settings.ini').read_text(), flags=re.M)
    tmp_path.mkdir()
    (tmp_path/'settings.ini').write_text(text)
    return tmp_path


def test_links_follow_one_switch(tmp_path):
    from links import notebook_links, source_link
    off, on = (settings_folder(tmp_path/str(k), k) for k in (False, True))
    assert notebook_links('index', off) == '' and 'http' not in source_link('a.py', '#L1-L2', root=off)
    assert source_link('a.py', '#L1-L2', 'Source', off) == 'Source: `a.py`, lines 1 to 2'
    links = notebook_links('03_paths', on)
    known = configparser.ConfigParser(delimiters=['='])
    known.read(ROOT/'settings.ini')
    place = known['DEFAULT']['git_url'].removeprefix('https://github.com/')
    assert f'colab.research.google.com/github/{place}/blob/main/nbs/03_paths.ipynb' in links
    assert f'mybinder.org/v2/gh/{place}/main?urlpath=lab/tree/nbs/03_paths.ipynb' in links
    assert source_link('a.py', '#L3', root=on) == f'[a.py](https://github.com/{place}/blob/main/a.py#L3)'


def test_nothing_points_to_an_unpublished_repository():
    from links import published, settings
    if published(): pytest.skip('the repository is published')
    for name in ('README.md', 'CITATION.cff'):
        text = (ROOT/name).read_text()
        assert settings()['git_url'] not in text and 'colab.research' not in text and 'mybinder' not in text, name
    for p in NOTEBOOKS:
        text = '\n'.join(cells(p, 'markdown'))
        assert settings()['git_url'] not in text and 'mybinder' not in text, p.name


def test_norms_alone_say_what_five_tokenizers_do():
    for r in FAMILY:
        for z in (r['raw'], r['standardised']):
            assert z['excursion_sigma'] == pytest.approx(z['expected_excursion_sigma'], abs=.016)
            assert z['share'] == pytest.approx(z['expected_share'], abs=.02)
    assert max(abs(x - 1/3) for x in family('taesd', 'taesdxl', key='swap')) < .04 and max(abs(x - .1) for x in family('taef2', key='swap')) < .02
