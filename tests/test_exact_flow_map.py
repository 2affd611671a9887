"""Flow maps: the semigroup property, what a step teaches, training, starting from other runs, and sampling in few steps."""
import copy
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.flow_map import lesson, mean_velocity, walk, ways
from spherical_lfm.paths import ARMS, SlerpPath, arm_path
from spherical_lfm.sampling import SHORTEST, Sampler, guided_velocity, initial_noise, load_run, sample, velocity_field
from spherical_lfm.sit import SiT
from spherical_lfm.sphere import angle, project, tangent
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools.pipeline import FlowScheduler, SphericalSiTPipeline
from spherical_lfm.tools.plan import evaluations
from spherical_lfm.training import TrainConfig, Trainer, flow_loss

SMALL = dict(model='SiT-Ti/2', batch_size=16, log_every=1, lr=1e-3, flow_map=4)
SHAPE = (6, 4, 2, 2)


def points(arm, seed=0):
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return project(z) if ARMS[arm].spherical else z


def turn(t, end):
    "The flow of a constant rotation between two of four channels, as a matrix per sample."
    a = (end - t)*1.3
    rows = torch.eye(4, dtype=a.dtype).repeat(len(a), 1, 1)
    rows[:, 0, 0], rows[:, 0, 2], rows[:, 2, 0], rows[:, 2, 2] = a.cos(), -a.sin(), a.sin(), a.cos()
    return rows


def exact(path, z, t, y, end=None):
    "A network that knows the flow map of that rotation; its velocity where no time passes."
    end = t if end is None else end
    later = torch.where(end > t, end, t + 1e-6)
    return path.log(z, torch.einsum('bcd,bdhw->bchw', turn(t, later), z))/(later - t).view(-1, 1, 1, 1)


@pytest.mark.parametrize('arm', ['spherical-slerp', 'vanilla-linear', 'vanilla-shell'])
def test_two_steps_of_a_flow_map_are_one(arm):
    path, z, g = arm_path(arm), points(arm), torch.Generator().manual_seed(3)
    t, middle, end = torch.rand(3, 6, generator=g, dtype=torch.float64).sort(0).values
    model = partial(exact, path)
    want = torch.einsum('bcd,bdhw->bchw', turn(t, end), z)
    torch.testing.assert_close(walk(model, path, z, t, end, None), want, rtol=0, atol=1e-6)
    u = mean_velocity(model, path, z, t, middle, end, None)
    torch.testing.assert_close(u, path.tangent(z, model(z, t, None, end)), rtol=0, atol=1e-6)
    torch.testing.assert_close(path.step(z, u, (end - t).view(-1, 1, 1, 1)), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize('arm', ARMS)
def test_a_logarithm_undoes_a_step(arm):
    path, z, w = arm_path(arm), points(arm), points(arm, seed=1)
    torch.testing.assert_close(path.step(z, path.log(z, w), 1.), w, rtol=0, atol=1e-9)


def test_steps_have_any_length_and_the_others_none():
    config = TrainConfig(**SMALL | {'batch_size': 8000})
    t = torch.rand(8000, generator=torch.Generator().manual_seed(0))
    times, middle, end = ways(config, 5, t)
    length, learns = end - times, torch.arange(8000) % 4 == 3
    assert torch.equal(times[~learns], t[~learns]) and not length[~learns].any() and not (middle - times)[~learns].any()
    assert length[learns].min() >= SHORTEST - 1e-6 and end.max() <= 1 + 1e-6 and times.min() >= 0
    torch.testing.assert_close((middle - times)[learns], length[learns]/2, rtol=0, atol=1e-6)
    shares = (length[learns]*4).long().clamp(max=3).bincount()/learns.sum()
    assert (shares - .25).abs().max() < .03, 'lengths are uniform'
    again, other = ways(config, 5, t), ways(config, 6, t)
    assert torch.equal(again[2], end) and not torch.equal(other[2], end)


class Table(nn.Module):
    "Says a multiple of one direction: its class, and a hundred times how far the step goes."
    def forward(self, z, t, y, end):
        return torch.ones_like(z)*(y + 100*(end - t)).view(-1, 1, 1, 1).to(z)


def test_what_is_taught_is_the_velocity_and_for_some_the_mean_of_two_steps():
    path, z0, z1 = arm_path('vanilla-linear'), points('vanilla-linear'), points('vanilla-linear', 1)
    t, y = torch.full((6,), .25, dtype=torch.float64), torch.tensor([1, 2, 9, 1, 2, 9])
    middle, end = t.clone(), t.clone()
    middle[2::3], end[2::3] = .35, .65
    plain = lesson(Table(), path, (z0, z1, t, y, middle, end), 3)
    torch.testing.assert_close(plain.target[:2], (z1 - z0)[:2])
    two_steps = (.1*(9 + 10) + .3*(9 + 30))/.4
    torch.testing.assert_close(plain.target[2::3], torch.full_like(z0[2::3], two_steps))
    assert torch.equal(plain.end, end)
    guided = lesson(Table(), path, (z0, z1, t, y, middle, end), 3, guidance=3., null_class=2).target
    torch.testing.assert_close(guided[0], (2 + 3*(z1 - z0 - 2))[0])
    torch.testing.assert_close(guided[1], (z1 - z0)[1], msg='the null class is not led away from itself')
    torch.testing.assert_close(guided[2::3], plain.target[2::3])


def test_the_loss_compares_with_the_lesson():
    path, z0, z1 = arm_path('spherical-slerp'), points('spherical-slerp'), points('spherical-slerp', 1)
    t, y = torch.full((6,), .25, dtype=torch.float64), torch.arange(6)
    end = t + torch.tensor([0, 0, .5, 0, 0, .5])
    taught = lesson(partial(exact, path), path, (z0, z1, t, y, (t + end)/2, end), 3)
    loss, power = flow_loss(partial(exact, path), path, z0, z1, t, y, lesson=taught)
    assert loss[2::3].max() < 1e-9 and loss[[0, 1, 3, 4]].min() > .1
    torch.testing.assert_close(power, taught.target.square().mean((1, 2, 3)))


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp('flow-map')/'latents'
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder, Encoding(flip=False), order=torch.arange(200), progress=False)
    return folder


def trainer_for(latents, out, **settings):
    config = TrainConfig(**SMALL | settings)
    return Trainer(config, LatentDataset(latents, project=arm_path(config.arm).projection), out)


def open_gates(trainer, size=.05):
    "Weights and averaged weights that differ, without zeros."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p, e in zip(trainer.parameters, trainer.ema):
            p += size*torch.randn(p.shape, generator=g)
            e.copy_(p + .3*size*torch.randn(p.shape, generator=g))


@pytest.mark.parametrize('settings', [{}, {'guidance': 2.}, {'arm': 'vanilla-linear', 'accumulate': 2}])
def test_a_step_is_the_one_written_by_hand(latents, tmp_path, settings):
    trainer = trainer_for(latents, tmp_path, label_dropout=.3, **settings)
    open_gates(trainer)
    teacher, path = copy.deepcopy(trainer.net), trainer.path
    for p, e in zip((p for p in teacher.parameters() if p.requires_grad), trainer.ema): p.data.copy_(e)
    z0, z1, t, y, middle, end = trainer.draws(0)
    z, v = path.interpolate(z0, z1, t)
    target, shape = path.tangent(z, v), (-1, 1, 1, 1)
    with torch.no_grad():
        if (w := trainer.config.guidance) != 1.:
            without = path.tangent(z, teacher(z, t, torch.full_like(y, 10)))
            target[y < 10] = (without + w*(target - without))[y < 10]
        for k in range(3, 16, 4):
            one = slice(k, k + 1)
            half = (middle - t)[one].view(shape)
            here = path.step(z[one], path.tangent(z[one], teacher(z[one], t[one], y[one], middle[one])), half)
            there = path.step(here, path.tangent(here, teacher(here, middle[one], y[one], end[one])), half)
            target[one] = path.log(z[one], there)/(2*half)
    loss = (path.tangent(z, trainer.net(z, t, y, end)) - target).square().mean((1, 2, 3))
    grads = torch.autograd.grad(loss.mean(), trainer.parameters)
    before = [p.clone() for p in trainer.parameters]
    found, _ = trainer._accumulate_loss(trainer.draws(0))
    torch.testing.assert_close(found, loss.detach(), rtol=2e-3, atol=1e-5)
    for g, p, old in zip(grads, trainer.parameters, before):
        assert torch.equal(p, old), 'averaged weights were left in place'
        assert (p.grad - g).abs().max() < 1e-3*g.abs().max() + 1e-7


def test_in_bf16_averaged_weights_teach_and_the_others_learn(latents, tmp_path):
    "What autocast has cast must not outlive the weights that it was cast from."
    trainer = trainer_for(latents, tmp_path, precision='bf16')
    open_gates(trainer)
    teacher, pupil = copy.deepcopy(trainer.net), copy.deepcopy(trainer.net)
    for p, e in zip((p for p in teacher.parameters() if p.requires_grad), trainer.ema): p.data.copy_(e)
    part = trainer.draws(0)
    with torch.autocast('cpu', torch.bfloat16):
        want = lesson(teacher, trainer.path, part, 4)
        loss, _ = flow_loss(pupil, trainer.path, *part[:4], lesson=want)
    assert torch.equal(trainer._lesson(part).target, want.target)
    torch.testing.assert_close(trainer._accumulate_loss(part)[0], loss.detach(), rtol=0, atol=0)


def test_a_run_goes_on_as_if_it_had_not_stopped_and_knows_its_kind(latents, tmp_path):
    whole = trainer_for(latents, tmp_path/'whole', steps=6)
    whole.fit(progress=False)
    trainer_for(latents, tmp_path/'parts', steps=6).fit(until=3, progress=False)
    parts = trainer_for(latents, tmp_path/'parts', steps=6)
    parts.fit(progress=False)
    assert [r['loss'] for r in parts.log()] == [r['loss'] for r in whole.log()]
    assert load_run(tmp_path/'parts').model.config.flow_map
    with pytest.raises(ValueError, match='flow_map: 4 -> 0'): trainer_for(latents, tmp_path/'parts', steps=8, flow_map=0).fit(progress=False)


@pytest.fixture(scope='module')
def plain(latents, tmp_path_factory):
    "A trained run without a flow map."
    run = tmp_path_factory.mktemp('start')/'run'
    trainer_for(latents, run, steps=5, flow_map=0, ema_decay=.5).fit(progress=False)
    return run


def test_a_run_starts_where_another_one_ended(latents, plain, tmp_path):
    first = load_run(plain)
    z, t, y = project(torch.randn(4, 16, 4, 4)), torch.rand(4), torch.arange(4)
    file = tmp_path/'published.safetensors'
    shutil.copyfile(plain/'checkpoints'/'step-00000005'/'ema'/'diffusion_pytorch_model.safetensors', file)
    for start in (plain, plain/'checkpoints'/'step-00000005'/'ema', file):
        trainer = trainer_for(latents, tmp_path/'next', start=str(start))
        for weights in (trainer.net, first.model): assert torch.equal(weights(z, t, y), first.model(z, t, y))
        assert torch.equal(trainer.net(z, t, y, torch.ones(4)), first.model(z, t, y))
        assert all(torch.equal(a, b) for a, b in zip(trainer.ema, trainer.weights))
    trainer = trainer_for(latents, tmp_path/'next', start=str(plain), steps=2)
    trainer.fit(progress=False)
    again = trainer_for(latents, tmp_path/'next', start=str(plain), steps=3)
    again.fit(progress=False)
    assert again.step == 3
    with pytest.raises(ValueError, match='start:'): trainer_for(latents, tmp_path/'next', steps=4).fit(progress=False)


@pytest.mark.parametrize('after', ['trained on', 'gone'])
def test_a_run_needs_its_start_no_more_once_it_has_begun(latents, plain, tmp_path, after):
    start = shutil.copytree(plain, tmp_path/'start')
    trainer_for(latents, tmp_path/'whole', start=str(start), steps=3).fit(progress=False)
    trainer_for(latents, tmp_path/'parts', start=str(start), steps=3).fit(2, progress=False)
    if after == 'gone': shutil.rmtree(start)
    else: trainer_for(latents, start, steps=7, flow_map=0, ema_decay=.5).fit(progress=False)
    parts = trainer_for(latents, tmp_path/'parts', start=str(start), steps=3)
    parts.fit(progress=False)
    assert [r['loss'] for r in parts.log()] == [r['loss'] for r in Trainer.log(SimpleNamespace(out=tmp_path/'whole'))]
    files = [tmp_path/run/'checkpoints'/'step-00000003'/'model'/'diffusion_pytorch_model.safetensors' for run in ('whole', 'parts')]
    for k, w in load_file(files[0]).items(): assert torch.equal(w, load_file(files[1])[k]), k


@pytest.mark.parametrize('wrong,words', [
    (dict(flow_map=1), 'at least 2'), (dict(flow_map=3), 'a multiple of 3'), (dict(guidance=-1.), 'at least 0'),
    (dict(flow_map=0, guidance=2.), 'set flow_map'), (dict(prediction='data'), 'mean velocities'), (dict(jacobi=True), 'mean velocities'),
    (dict(start='/no/such/run'), 'nothing to start with'),
])
def test_what_no_flow_map_can_learn_is_refused(latents, tmp_path, wrong, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words): trainer_for(latents, tmp_path/'run', **wrong)
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('change,words', [({'model': 'SiT-Ti/1'}, 'patch_size 2, not 1'), ({'model': 'SiT-S/2'}, 'hidden_size 128, not 384')])
def test_weights_of_another_network_are_no_start(latents, plain, tmp_path, change, words):
    with pytest.raises(ValueError, match=words): trainer_for(latents, tmp_path/'run', start=str(plain), **change)


def test_a_second_time_is_not_left_out_silently(latents, tmp_path):
    trainer_for(latents, tmp_path/'map', steps=1).fit(progress=False)
    with pytest.raises(ValueError, match='flow_map, which this run leaves out'):
        trainer_for(latents, tmp_path/'run', start=str(tmp_path/'map'), flow_map=0)


class Knows(nn.Module):
    "The flow map of arcs towards one point per class; no motion for the null class."
    def __init__(self, path, ends):
        super().__init__()
        self.path, self.ends, self.calls = path, ends, []
        self.config = SiT(input_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=1, num_classes=6, flow_map=True).config

    def forward(self, z, t, y, end=None):
        self.calls.append((t[0].item(), None if end is None else end[0].item()))
        towards = self.path.log(z, self.ends[y.clamp(max=5)])/(1 - t).view(-1, 1, 1, 1)
        return torch.where((y == 6).view(-1, 1, 1, 1), 0., towards)


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_few_steps_land_where_the_map_says(steps):
    path = SlerpPath()
    ends = project(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)))
    model = Knows(path, ends)
    z = sample(model, path, torch.arange(6), Sampler(steps, 'flow_map'))
    assert angle(z, ends).max() < 2e-3
    assert model.calls == [pytest.approx((k/steps, (k + 1)/steps)) for k in range(steps)]
    assert evaluations(Sampler(steps, 'flow_map')) == steps and evaluations(Sampler(steps, 'flow_map', guidance=2.)) == 2*steps
    assert evaluations(Sampler(4, "flow_map", guidance=2., interval=(.3, .6))) == 5, "in the interval one step begins"


def test_guidance_of_a_flow_map_asks_twice_with_the_same_end():
    path = SlerpPath()
    ends = project(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)))
    model, z, y = Knows(path, ends), initial_noise(path, SHAPE[1:], range(6)), torch.arange(6)
    v = guided_velocity(model, path, z, .25, y, Sampler(4, 'flow_map', guidance=3.), 6, end=.5)
    one = path.tangent(z, path.log(z, ends)/.75)
    torch.testing.assert_close(v, 3*one, rtol=0, atol=1e-4)
    assert model.calls == [(.25, .5)]


def test_what_no_flow_map_can_do_is_refused(plain):
    run = load_run(plain)
    with pytest.raises(ValueError, match='no flow map: train one with --flow_map'):
        sample(run.model, run.path, torch.arange(0), Sampler(1, 'flow_map')) # as commands ask before they write anything
    with pytest.raises(ValueError, match='no velocity to speed up'): Sampler(2, 'flow_map', speed=(1.1,))
    with pytest.raises(ValueError, match='no step shorter than 0.01, got 101 steps: take at most 100'): Sampler(101, 'flow_map')
    assert Sampler(100, 'flow_map').steps == 100
    now = torch.full((2,), .5)
    with pytest.raises(ValueError, match='let end be no earlier than t'): walk(run.model, run.path, torch.randn(2, 16, 4, 4), now, now - .1, torch.arange(2))


@pytest.fixture(scope='module')
def trained(latents, tmp_path_factory):
    "A run with a flow map whose weights are not near zero."
    run = tmp_path_factory.mktemp('trained')/'run'
    trainer = trainer_for(latents, run, steps=1)
    open_gates(trainer)
    trainer.fit(progress=False)
    return run


def test_pipeline_and_scheduler_take_the_steps_of_sample(trained, tmp_path):
    run, y, steps = load_run(trained), torch.arange(3), 4
    noise = initial_noise(run.path, (16, 4, 4), range(3))
    want = sample(run.model, run.path, y, Sampler(steps, 'flow_map', guidance=1.5), noise)
    pipe = SphericalSiTPipeline.from_run(trained, tokenizer='digits')
    assert pipe.scheduler.config.method == 'flow_map'
    pipe.save_pretrained(tmp_path/'saved')
    for p in (pipe, SphericalSiTPipeline.from_pretrained(tmp_path/'saved')):
        p.set_progress_bar_config(disable=True)
        assert p.scheduler.config.method == 'flow_map' and p.transformer.config.flow_map
        found = p(y, guidance_scale=1.5, num_inference_steps=steps, latents=noise, output_type='latent').images
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
        usual = p(y, latents=noise, output_type='latent').images
        torch.testing.assert_close(usual, sample(run.model, run.path, y, Sampler(4, 'flow_map'), noise), rtol=0, atol=1e-5)
    scheduler = FlowScheduler('spherical-slerp', 'flow_map')
    scheduler.set_timesteps(steps)
    field, z = velocity_field(run.model, run.path, y, Sampler(steps, 'flow_map')), noise
    for k, t in enumerate(scheduler.timesteps): z = scheduler.step(field(z, k/steps, end=(k + 1)/steps), t, z).prev_sample
    torch.testing.assert_close(z, sample(run.model, run.path, y, Sampler(steps, 'flow_map'), noise), rtol=0, atol=1e-5)


def test_an_ordinary_solver_follows_the_instant(trained):
    run, y, noise = load_run(trained), torch.arange(3), project(torch.randn(3, 16, 4, 4))
    with torch.no_grad(): v = tangent(noise, run.model(noise, torch.zeros(3), y, torch.zeros(3)))
    torch.testing.assert_close(sample(run.model, run.path, y, Sampler(1), noise), run.path.step(noise, v, 1.), rtol=0, atol=1e-5)


class Turns(nn.Module):
    "Velocities that are linear in the place, with factors that depend on the times."
    def __init__(self, d, parts=4):
        super().__init__()
        self.matrices = nn.Linear(d, parts*d, bias=False)
        nn.init.zeros_(self.matrices.weight)
        self.times = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, parts))

    def forward(self, z, t, y, end):
        each = self.matrices(z.flatten(1)).unflatten(1, (-1, z.shape[1]))
        return torch.einsum('bk,bkd->bd', self.times(torch.stack([t, end - t], 1)), each)[..., None, None]


@pytest.mark.parametrize('d', [16, 512])
def test_a_helix_is_learned_in_few_steps(d):
    "A flow with an exact map, every plane at its own speed: nearer to it at each number of steps than Euler with the exact velocity."
    path, speeds, g = SlerpPath(), torch.linspace(.5, 3.5, d//2).view(-1, 1, 1), torch.Generator().manual_seed(0)

    def velocity(z):
        x, y = z.chunk(2, 1)
        return torch.cat([-speeds*y, speeds*x], 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Turns(d)
    optimizer, steps = torch.optim.Adam(net.parameters()), 600
    for k in range(steps):
        z, t, length = path.prior((64, d, 1, 1), g), torch.rand(64, generator=g), .01 + .99*torch.rand(32, generator=g)
        t[:32] *= 1 - length
        end, target = t.clone(), velocity(z)
        end[:32] += length
        with torch.no_grad(): target[:32] = mean_velocity(net, path, z[:32], t[:32], t[:32] + length/2, end[:32], None)
        optimizer.param_groups[0]['lr'] = 1e-2*(1 - k/steps)
        optimizer.zero_grad()
        (path.tangent(z, net(z, t, None, end)) - target).square().mean().backward()
        optimizer.step()
    z = path.prior((500, d, 1, 1), torch.Generator().manual_seed(1))
    (x, y), c, s = z.chunk(2, 1), speeds.cos(), speeds.sin()
    exact_end = torch.cat([c*x - s*y, s*x + c*y], 1)
    for n in (1, 2, 4, 8):
        by_map = by_euler = z
        for k in range(n):
            with torch.no_grad(): by_map = walk(net, path, by_map, *(torch.full((500,), j/n) for j in (k, k + 1)), None)
            by_euler = path.step(by_euler, velocity(by_euler), 1/n)
        missed, euler = (angle(w, exact_end).mean() for w in (by_map, by_euler))
        assert missed < .7*euler, (n, missed, euler)
