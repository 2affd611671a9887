"""The trainer against twenty lines of plain torch: weights, moments, average, rate, clipping, decay, and its draws."""
import copy
import math

import pytest
import torch
from scipy import stats

from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.latents import LatentDataset, encode_latents
from spherical_lfm.paths import SlerpPath, arm_path
from spherical_lfm.sampling import load_run
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.training import TrainConfig, Trainer, flow_loss, ot_coupling

SMALL = dict(model='SiT-Ti/2', batch_size=16, log_every=1, lr=1e-3)


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    "Two hundred digits and their mirror images."
    folder = tmp_path_factory.mktemp('exact')/'latents'
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder, order=torch.arange(200), progress=False)
    return folder


def trainer_for(latents, out, **settings):
    config = TrainConfig(**SMALL | settings)
    trainer = Trainer(config, LatentDataset(latents, project=arm_path(config.arm).projection), out)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.parameters: p += .05*torch.randn(p.shape, generator=g)  # opens the gates that start at zero
        for e, p in zip(trainer.ema, trainer.parameters): e.copy_(p)
    return trainer


def loss_by_hand(net, draws, arm):
    "Squared error of the velocity, by the textbook formulas in float64."
    z0, z1, t, y = draws
    a, b, s = z0.double(), z1.double(), t.double().view(-1, 1, 1, 1)
    if arm == 'spherical-slerp':
        theta = torch.acos((a*b).sum(1, keepdim=True)/(a.norm(dim=1, keepdim=True)*b.norm(dim=1, keepdim=True)))
        z = (torch.sin((1 - s)*theta)*a + torch.sin(s*theta)*b)/torch.sin(theta)
        v = theta/torch.sin(theta)*(torch.cos(s*theta)*b - torch.cos((1 - s)*theta)*a)
    else:
        z, v = (1 - s)*a + s*b, b - a
    out = net(z.float(), t, y).double()
    if arm == 'spherical-slerp': out = out - (out*z).sum(1, keepdim=True)/(z*z).sum(1, keepdim=True)*z
    return (out - v).square().mean((1, 2, 3))


def decay_at(step, decay): return min(decay, (1 + step)/(10 + step))


def train_by_hand(net, draws, c):
    "AdamW with warm-up, clipping, decoupled decay and an average of the weights; returns what each step did."
    parameters = [p for p in net.parameters() if p.requires_grad]
    m, v, ema = [[torch.zeros_like(p) for p in parameters]
                 for _ in range(2)] + [[p.detach().clone() for p in parameters]]
    rows, (b1, b2) = [], c.betas
    for k, batch in enumerate(draws):
        loss = loss_by_hand(net, batch, c.arm)
        g = torch.autograd.grad(loss.mean(), parameters)
        norm = torch.stack([x.square().sum() for x in g]).sum().sqrt()
        if c.max_grad_norm: g = [x*min(1., c.max_grad_norm/norm) for x in g]
        lr = c.lr*min(1., (k + 1)/max(1, c.warmup))
        with torch.no_grad():
            for i, p in enumerate(parameters):
                m[i], v[i] = b1*m[i] + (1 - b1)*g[i], b2*v[i] + (1 - b2)*g[i]**2
                p *= 1 - lr*c.weight_decay
                p -= lr*(m[i]/(1 - b1**(k + 1)))/((v[i]/(1 - b2**(k + 1))).sqrt() + 1e-8)
                ema[i] += (1 - decay_at(k, c.ema_decay))*(p - ema[i])
        rows.append({'loss': loss.mean().item(), 'grad_norm': norm.item(), 'lr': lr})
    return parameters, m, v, ema, rows


@pytest.mark.parametrize('arm,settings', [
    ('spherical-slerp', dict(warmup=5, max_grad_norm=.5, weight_decay=20., betas=(.8, .95), ema_decay=.05)),
    ('vanilla-linear', dict(accumulate=2, ema_decay=.15)),
    ('spherical-linear', dict(warmup=2, ema_decay=.9)),
])
def test_training_steps_are_those_written_by_hand(latents, tmp_path, arm, settings):
    trainer = trainer_for(latents, tmp_path, arm=arm, label_dropout=.3, **settings)
    net, draws = copy.deepcopy(trainer.net), [trainer.draws(k) for k in range(3)]
    parameters, m, v, ema, rows = train_by_hand(net, draws, trainer.config)
    for k, row in enumerate(rows):
        found = trainer.train_step()
        trainer.step += 1
        assert found['loss'].item() == pytest.approx(row['loss'], rel=1e-4), k
        assert found['grad_norm'].item() == pytest.approx(row['grad_norm'], rel=1e-3), k
        assert trainer.optimizer.param_groups[0]['lr'] == pytest.approx(row['lr'])
    if trainer.config.max_grad_norm:
        assert min(r['grad_norm'] for r in rows) > 1.5*trainer.config.max_grad_norm, 'nothing was clipped'
    state = trainer.optimizer.state
    for i, p in enumerate(trainer.parameters):
        scale = m[i].abs().max().item() + 1e-12
        torch.testing.assert_close(state[p]['exp_avg'], m[i], rtol=0, atol=2e-3*scale)
        torch.testing.assert_close(state[p]['exp_avg_sq'], v[i], rtol=0, atol=4e-3*v[i].abs().max().item() + 1e-20)
        gap, moved = (p - parameters[i]).abs(), 3*trainer.config.lr
        assert gap.mean() < .01*moved and gap.max() < moved
        gap = (trainer.ema[i] - ema[i]).abs()
        assert gap.mean() < .01*moved and gap.max() < moved
    apart = torch.stack([(e - p).abs().mean() for e, p in zip(trainer.ema, trainer.parameters)]).mean()
    assert apart > 3e-5, 'average and weights differ'


def test_the_average_in_a_checkpoint_is_not_the_weights(latents, tmp_path):
    trainer = trainer_for(latents, tmp_path, steps=3, ema_decay=.9)
    trainer.fit(progress=False)
    model = load_run(tmp_path)[0]
    for p, e in zip((p for n, p in model.named_parameters() if n != 'pos_embed'), trainer.ema):
        torch.testing.assert_close(p, e)
    assert any(not torch.equal(e, p) for e, p in zip(trainer.ema, trainer.parameters))


def test_a_run_goes_on_as_if_it_had_not_stopped(latents, tmp_path):
    "Weights, average and moments of the optimiser, bit for bit."
    def make(name):
        data = LatentDataset(latents, project=project)
        return Trainer(TrainConfig(**SMALL, steps=4, ema_decay=.9), data, tmp_path/name)
    whole, parts = make('whole'), make('parts')
    whole.fit(progress=False)
    parts.fit(until=2, progress=False)
    resumed = make('parts')
    resumed.fit(progress=False)
    assert [r['loss'] for r in resumed.log()] == [r['loss'] for r in whole.log()]
    for a, b in zip(whole.parameters, resumed.parameters):
        x, y = whole.optimizer.state[a], resumed.optimizer.state[b]
        assert torch.equal(a, b) and all(torch.equal(x[k], y[k]) for k in ('exp_avg', 'exp_avg_sq', 'step'))
    for a, b in zip(whole.ema, resumed.ema): assert torch.equal(a, b)


def test_the_log_holds_means_over_its_interval(latents, tmp_path):
    "Loss, loss per power, norm of the gradient, and the loss of each quarter of t, over three steps."
    trainer = trainer_for(latents, tmp_path/'a', arm='vanilla-linear')
    steps, quarters = [], torch.zeros(2, 4)
    for k in range(3):
        z0, z1, t, y = trainer.draws(k)
        with torch.no_grad(): losses = loss_by_hand(trainer.net, (z0, z1, t, y), 'vanilla-linear')
        power = (z1 - z0).double().square().mean().item()
        for q in range(4): quarters[:, q] += torch.stack([losses[(4*t).long() == q].sum(), ((4*t).long() == q).sum()])
        found = trainer.train_step()
        trainer.step += 1
        steps.append((losses.mean().item(), power, found['grad_norm'].item()))
    loss, power, norm = (sum(x)/3 for x in zip(*steps))
    logged = trainer_for(latents, tmp_path/'b', arm='vanilla-linear', log_every=3, steps=3)
    logged.fit(progress=False)
    row = logged.log()[-1]
    assert row['step'] == 3 and row['loss'] == pytest.approx(loss, rel=1e-4)
    assert row['loss_over_power'] == pytest.approx(loss/power, rel=1e-4)
    assert row['grad_norm'] == pytest.approx(norm, rel=1e-3)
    for q in range(4): assert row[f'loss_q{q + 1}'] == pytest.approx((quarters[0, q]/quarters[1, q]).item(), rel=1e-3)


def test_bf16_is_bf16_where_the_network_works_and_float32_around_it(latents, tmp_path):
    losses = {}
    for precision, dtype in (('float32', torch.float32), ('bf16', torch.bfloat16)):
        trainer, seen = trainer_for(latents, tmp_path/precision, precision=precision), []
        trainer.net.blocks[0].mlp.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        found = trainer.train_step()
        assert set(seen) == {dtype} and found['loss'].dtype == torch.float32
        assert {p.dtype for p in trainer.parameters} == {torch.float32}
        losses[precision] = found['loss'].item()
    assert losses['bf16'] != losses['float32'] and losses['bf16'] == pytest.approx(losses['float32'], rel=.02)


def test_checkpointing_recomputes(latents, tmp_path):
    calls = {}
    for on in (False, True):
        trainer, seen = trainer_for(latents, tmp_path/str(on), checkpointing=on), []
        trainer.net.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
        trainer.train_step()
        calls[on] = len(seen)
    assert calls == {False: 1, True: 2}


def drawn(trainer, steps=range(80)):
    "Everything that so many steps draw, one after the other."
    return [torch.cat(x) for x in zip(*(trainer.draws(k) for k in steps))]


@pytest.mark.parametrize('settings,undo', [
    (dict(), lambda t: t),
    (dict(time_shift=3.), lambda t: 3*t/(1 + 2*t)),
    (dict(time_sampling='logit-normal'), lambda t: torch.special.ndtr(torch.logit(t))),
    (dict(time_sampling='logit-normal', time_shift=.5), lambda t: torch.special.ndtr(torch.logit(.5*t/(1 - .5*t)))),
])
def test_times_have_the_distribution_that_was_asked_for(latents, tmp_path, settings, undo):
    t = drawn(trainer_for(latents, tmp_path, **settings))[2]
    assert len(t) == 1280 and 0 <= t.min() and t.max() <= 1
    assert stats.kstest(undo(t.double()).numpy(), 'uniform').pvalue > 1e-3


@pytest.mark.parametrize('share', [0., .3, 1.])
def test_so_many_labels_are_dropped_to_the_null_class(latents, tmp_path, share):
    trainer = trainer_for(latents, tmp_path, label_dropout=share, flip=False)
    _, z1, _, y = drawn(trainer)
    data = LatentDataset(latents, project=project)
    every, labels = data.batch(torch.arange(200))
    number = torch.cdist(z1.flatten(1), every.flatten(1)).argmin(1)
    null = y == 10
    assert trainer.info['classes'] == 10 and torch.equal(y[~null], labels[number][~null])
    spread = math.sqrt(len(y)*share*(1 - share))
    assert abs(null.sum().item() - share*len(y)) <= 4*spread
    if share == .3: assert set(labels[number][null].tolist()) == set(range(10)), 'any class may be dropped'


@pytest.mark.parametrize('flip,share', [(False, 0.), (True, .5)])
def test_so_many_images_are_mirrored(latents, tmp_path, flip, share):
    z1 = drawn(trainer_for(latents, tmp_path, arm='vanilla-linear', flip=flip))[1]
    data = LatentDataset(latents)
    plain, mirrored = (data.batch(torch.arange(200), torch.full((200,), f))[0].flatten(1) for f in (False, True))
    near = torch.cdist(z1.flatten(1), torch.cat([plain, mirrored]))
    assert near.min(1).values.max() < .1
    count = (near.argmin(1) >= 200).sum().item()
    assert abs(count - share*len(z1)) <= 4*math.sqrt(len(z1)*share*(1 - share))


def test_every_image_is_seen_once_an_epoch(latents, tmp_path):
    trainer = trainer_for(latents, tmp_path, batch_size=50, flip=False, arm='vanilla-linear')
    every = LatentDataset(latents).batch(torch.arange(200))[0].flatten(1)
    epochs = [torch.cdist(drawn(trainer, range(k, k + 4))[1].flatten(1), every).argmin(1) for k in (0, 4)]
    for e in epochs: assert sorted(e.tolist()) == list(range(200))
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], torch.arange(200))


def test_noise_is_fresh_gaussian_and_the_same_for_all_arms(latents, tmp_path):
    found = {arm: [trainer_for(latents, tmp_path/arm, arm=arm, seed=3).draws(k) for k in range(4)]
             for arm in ('vanilla-linear', 'vanilla-shell', 'spherical-linear', 'spherical-slerp')}
    gauss = torch.cat([d[0] for d in found['vanilla-linear']])
    assert stats.kstest(gauss.flatten().numpy(), 'norm').pvalue > 1e-3
    steps = [d[0] for d in found['vanilla-linear']]
    for a, b in ((0, 1), (1, 2), (0, 3)):
        assert abs(torch.corrcoef(torch.stack([steps[a].flatten(), steps[b].flatten()]))[0, 1]) < .1
    for k, (z0, z1, t, y) in enumerate(found['vanilla-linear']):
        for arm in ('vanilla-shell', 'spherical-linear', 'spherical-slerp'):
            a0, a1, at, ay = found[arm][k]
            assert torch.equal(at, t) and torch.equal(ay, y)
            for got, plain in ((a0, z0), (a1, z1)):
                want = 4*plain/plain.norm(dim=1, keepdim=True) if arm.startswith('spherical') else plain
                torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    other = trainer_for(latents, tmp_path/'other', arm='vanilla-linear', seed=4).draws(0)
    for a, b in zip(other, found['vanilla-linear'][0]): assert not torch.equal(a, b), 'another seed, other draws'


def test_the_seed_alone_initialises(latents, tmp_path):
    data = LatentDataset(latents, project=project)
    weights = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(noise)
        weights.append(Trainer(TrainConfig(**SMALL, seed=seed), data,
                               tmp_path).net.x_embedder.proj.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize('project', [True, False])
def test_radial_errors_count_only_without_projection(project):
    "A model that is wrong along z alone makes no error under the projected loss, and its square without."
    g = torch.Generator().manual_seed(0)
    path = SlerpPath(project_velocity=project)
    z0, z1 = (path.prior((6, 8, 2, 2), g) for _ in range(2))
    t, y = torch.rand(6, generator=g), torch.zeros(6, dtype=torch.long)
    loss, power = flow_loss(lambda z, t, y: path.interpolate(z0, z1, t)[1] + .5*z, path, z0, z1, t, y)
    torch.testing.assert_close(loss, torch.full((6,), 0. if project else .25), atol=1e-5, rtol=0)
    theta = torch.acos((z0*z1).sum(1)/8)
    want = theta.square().mean((1, 2)) # |v|² = R²θ², over d channels
    torch.testing.assert_close(power, want, rtol=1e-3, atol=1e-4)


def test_the_jacobi_weight_is_the_squared_sinc():
    g = torch.Generator().manual_seed(0)
    path = SlerpPath()
    z0, z1 = (path.prior((6, 8, 2, 2), g) for _ in range(2))
    t, y = torch.rand(6, generator=g)*.9, torch.zeros(6, dtype=torch.long)
    loss, _ = flow_loss(lambda z, t, y: torch.zeros_like(z), path, z0, z1, t, y, True)
    theta = torch.acos((z0*z1).sum(1)/8)
    x = (1 - t).view(-1, 1, 1)*theta
    torch.testing.assert_close(loss, (theta.square()*(torch.sin(x)/x).square()).mean((1, 2)), rtol=1e-3, atol=1e-4)


def test_transport_finds_the_smallest_sum_of_angles():
    from itertools import permutations
    g = torch.Generator().manual_seed(0)
    z0, z1 = (SlerpPath().prior((5, 4, 2, 2), g) for _ in range(2))
    # of noise a and data b
    angles = torch.stack([torch.stack([torch.acos((a*b).sum(0)/4).sum() for a in z0]) for b in z1])
    best = min(permutations(range(5)), key=lambda p: sum(angles[n, m].item() for n, m in enumerate(p)))
    assert ot_coupling(z0, z1).tolist() == list(best) != list(range(5))


def test_coupling_pairs_the_noise_of_a_step(latents, tmp_path):
    plain, paired = (trainer_for(latents, tmp_path/c, coupling=c, flip=False).draws(0)
                     for c in ('independent', 'transport'))
    order = ot_coupling(plain[0], plain[1])
    assert torch.equal(paired[0], plain[0][order]) and torch.equal(paired[1], plain[1])
