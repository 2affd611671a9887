"""A step of decoder and discriminator by hand; orders, flips and averages; PSNR, SSIM and rFID as they should be."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import blocks, noise
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from spherical_lfm.decoder import (
    DecoderTrainer,
    FinetuneConfig,
    PatchDiscriminator,
    _Feed,
    adaptive_weight,
    discriminator_loss,
    reconstruction_metrics,
)
from spherical_lfm.engine.features import frechet_distance, ssim
from spherical_lfm.engine.images import digits_images
from spherical_lfm.engine.runs import DataOrder, seeded_generator
from spherical_lfm.engine.weights import DATA
from spherical_lfm.tokenizers import load_tokenizer

IMAGES = digits_images('train')[0][:96]


def test_the_hinge_loss_by_hand():
    real, fake = torch.tensor([2., .5, -1.]), torch.tensor([-3., -.5, 1.])
    assert discriminator_loss(real, fake).item() == pytest.approx(((0 + .5 + 2)/3 + (0 + .5 + 2)/3)/2)
    assert discriminator_loss(real, fake) != discriminator_loss(fake, real)


def test_the_adaptive_weight_by_hand():
    "Losses 3 a + 4 b and 6 a - 8 b at the last layer (a, b): gradients of norm 5 and 10."
    w = torch.zeros(2, requires_grad=True)
    weight = adaptive_weight((torch.tensor([3., 4.])*w).sum(), (torch.tensor([6., -8.])*w).sum(), w)
    assert weight.item() == pytest.approx(.5, rel=1e-4) and not weight.requires_grad
    assert adaptive_weight(w.sum(), 0*w.sum(), w).item() == 1e4


def test_the_discriminator_is_convolutions_of_the_input():
    net, x = PatchDiscriminator(8, 2), noise(2, 3, 16, 16)
    first, second, norm, last = net[0], net[2], net[3], net[5]
    h = F.leaky_relu(F.conv2d(x, first.weight, first.bias, 2, 1), .2)
    h = F.leaky_relu(F.group_norm(F.conv2d(h, second.weight, None, 2, 1), 8, norm.weight, norm.bias), .2)
    torch.testing.assert_close(net(x), F.conv2d(h, last.weight, last.bias, 1, 1))


def adam(p, g, state, c):
    "One step of Adam with the betas of the config, on plain tensors."
    b1, b2 = c.betas
    m, v, k = state.get(id(p), (0, 0, 0))
    m, v, k = b1*m + (1 - b1)*g, b2*v + (1 - b2)*g**2, k + 1
    state[id(p)] = m, v, k
    with torch.no_grad(): p -= c.lr*(m/(1 - b1**k))/((v/(1 - b2**k)).sqrt() + 1e-8)


def perceived(a, b): return (a - b).square().mean((1, 2, 3))


@pytest.mark.parametrize('spherical', [True, False])
def test_steps_of_finetuning_are_those_written_by_hand(tmp_path, spherical):
    "Two steps before the discriminator joins, two after."
    c = FinetuneConfig(batch_size=8, lr=1e-3, perceptual='none', perceptual_weight=2., adversarial_weight=.3,
                       discriminator_start=2, ema_decay=.7, discriminator_width=8)
    trainer = DecoderTrainer(load_tokenizer(DATA/'digits'/'vanilla', spherical=spherical), IMAGES, c, tmp_path)
    trainer.perceptual = perceived
    start, critic = copy.deepcopy(trainer.tokenizer), copy.deepcopy(trainer.discriminator)
    learned = [p for n, p in start.autoencoder.named_parameters() if n.startswith(('decoder.', 'post_quant_conv.'))]
    ema, state = [p.detach().clone() for p in learned], {}
    for step in range(4):
        x = trainer.feed(step)
        with torch.no_grad():
            z = (start.autoencoder.encode(x).latent_dist.mode() - start.transform.mean)/start.transform.std
        if spherical: z = 4*z/z.norm(dim=1, keepdim=True)
        recon = start.autoencoder.decode(z*start.transform.std + start.transform.mean).sample
        l1, p = (recon - x).abs().mean(), perceived(recon, x).mean()
        loss, weight = l1 + 2*p, torch.zeros(())
        if step >= 2:
            last = start.autoencoder.decoder.conv_out.weight
            adversarial = -critic(recon).mean()
            norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (loss, adversarial)]
            weight = .3*norms[0]/(norms[1] + 1e-4)
            loss = loss + weight.detach()*adversarial
        gradients = torch.autograd.grad(loss, learned)
        found = trainer.train_step()
        trainer.step += 1
        for k, want in (('loss', loss), ('l1', l1), ('perceptual', p), ('weight', weight)):
            assert found[k].item() == pytest.approx(want.item(), rel=2e-3), (step, k)
        want = np.mean([peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=2) for a,
                        b in zip(x, recon.detach().clamp(-1, 1))])
        assert found['psnr'].item() == pytest.approx(want, abs=.02)
        for q, g, e in zip(learned, gradients, ema):
            adam(q, g, state, c)
            e += .3*(q.detach() - e)
        if step >= 2:
            scores = critic(torch.cat([x, recon.detach()])).chunk(2)
            hinge = (F.relu(1 - scores[0]).mean() + F.relu(1 + scores[1]).mean())/2
            for q, g in zip(list(critic.parameters()), torch.autograd.grad(hinge, list(critic.parameters()))):
                adam(q, g, state, c)
    moved = 4*c.lr
    for found, want in ((trainer.weights, learned), (trainer.ema, ema),
                        (list(trainer.discriminator.parameters()), list(critic.parameters()))):
        for a, b in zip(found, want, strict=True): assert (a - b).abs().mean() < .02*moved
    assert trainer.optimizer.param_groups[0]['weight_decay'] == 0
    returned = trainer.finetuned()
    found = dict(returned.autoencoder.named_parameters())
    for n, e in zip(trainer._names, trainer.ema): assert torch.equal(found[n], e)
    assert returned.spherical == spherical and any(not torch.equal(e, w) for e, w in zip(trainer.ema, trainer.weights))


def test_finetuning_in_bf16_decodes_in_bf16(tmp_path):
    for precision, dtype in (('float32', torch.float32), ('bf16', torch.bfloat16)):
        trainer = DecoderTrainer(load_tokenizer('digits'), IMAGES,
                                 FinetuneConfig(batch_size=8, perceptual='none', precision=precision), tmp_path)
        seen = []
        trainer.tokenizer.autoencoder.decoder.conv_in.register_forward_hook(lambda module, given,
                                                                            out: seen.append(out.dtype))
        trainer.train_step()
        assert set(seen) == {dtype} and {p.dtype for p in trainer.weights} == {torch.float32}


def feed(flip, images=IMAGES, batch=16): return _Feed(images, FinetuneConfig(batch_size=batch, flip=flip), slice(None))


@pytest.mark.parametrize('flip,share', [(False, 0.), (True, .5)])
def test_half_of_the_images_are_mirrored(flip, share):
    numbered = torch.arange(96.).view(-1, 1, 1, 1) + torch.tensor([0., .5])
    x = torch.cat([feed(flip, numbered)(k) for k in range(60)])
    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, 1]
    n = len(x)
    assert abs(mirrored.sum().item() - share*n) <= 4*math.sqrt(n*share*(1 - share))
    first = x[:96].amin((1, 2, 3))
    assert sorted(first.tolist()) == list(range(96)) and first.tolist() != list(range(96))


@pytest.mark.parametrize('count,batch', [(10, 4), (7, 7), (5, 12)])
def test_an_order_is_one_permutation_after_another(count, batch):
    order = DataOrder(count, batch, 3)
    steps = [order.indices(k) for k in range(4*count)]
    assert all(len(s) == batch for s in steps)
    epochs = torch.cat(steps)[:4*count].split(count)
    for e in epochs: assert sorted(e.tolist()) == list(range(count))
    assert len({tuple(e.tolist()) for e in epochs}) > 1
    for k in (17, 2, 5): assert torch.equal(DataOrder(count, batch, 3).indices(k), steps[k]), 'a function of the step'
    assert not torch.equal(torch.cat([DataOrder(count, batch, 4).indices(k) for k in range(9)]), torch.cat(steps[:9]))


def test_generators_are_functions_of_their_whole_key():
    keys = [(0, 1, 5), (0, 2, 5), (1, 1, 5), (0, 1, 6), (0, 1), (1, 0, 5)]
    draws = [torch.rand(4, generator=seeded_generator('cpu', *k)) for k in keys]
    assert len({tuple(d.tolist()) for d in draws}) == len(keys)
    assert torch.equal(torch.rand(4, generator=seeded_generator('cpu', *keys[0])), draws[0])


# ---- figures of reconstructions

def pairs(n=3, side=24):
    a = noise(n, 3, side, side, scale=.5).clamp(-1, 1)
    return a, (a + noise(n, 3, side, side, seed=1, scale=.2)).clamp(-1, 1)


def test_ssim_is_scikit_images():
    a, b = pairs()
    want = [structural_similarity((x/2 + .5).numpy(), (y/2 + .5).numpy(), data_range=1, channel_axis=0,
                                  gaussian_weights=True, sigma=1.5, use_sample_covariance=False) for x, y in zip(a, b)]
    assert ssim(a, b).tolist() == pytest.approx(want, abs=1e-4)
    assert ssim(a, a).tolist() == pytest.approx([1.]*3)


def grey(x): return F.adaptive_avg_pool2d(x, 4).flatten(1)


def test_reconstruction_metrics_by_hand():
    "Originals against what the decoder makes of them, in batches of any size."
    a, _ = pairs(25)
    tokenizer, other = blocks(), blocks(gain=.8)
    for decoder, gain in ((None, 1.), (other, .8)):
        found = [reconstruction_metrics(tokenizer, a, grey, {'mse': lambda x, y: (x - y).square().mean((1, 2, 3))},
                                        decoder, batch_size=n) for n in (25, 7)]
        made = (gain*a).clamp(-1, 1)
        for r in found:
            rfid = next(v for k, v in r.items() if k in ('rfid', 'rfd'))
            assert rfid == pytest.approx(frechet_distance(grey(a), grey(made)), rel=1e-3, abs=1e-6) and r['count'] == 25
            assert r['mse'] == pytest.approx(((1 - gain)*a).square().mean().item(), abs=1e-6)
            if gain < 1:
                assert r['psnr'] == pytest.approx(np.mean([peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2)
                                                           for x, y in zip(a, made)]), rel=1e-4)
                assert r['ssim'] == pytest.approx(ssim(made, a).mean().item(), rel=1e-4)
    assert found[0]['psnr'] < 30 < reconstruction_metrics(tokenizer, a)['psnr']


def test_a_decoder_that_always_says_the_same_is_far_away():
    a, _ = pairs(25)
    figures = reconstruction_metrics(blocks(gain=0.), a, grey)
    want = frechet_distance(grey(a), torch.zeros(25, 48))
    assert next(v for k, v in figures.items() if k in ('rfid', 'rfd')) == pytest.approx(want, rel=1e-3) and want > .2
    known = reconstruction_metrics(blocks(gain=0.), a, grey, reference=grey(a) + 3)
    found = next(v for k, v in known.items() if k in ('rfid', 'rfd'))
    assert found == pytest.approx(want + 9*48, rel=.2), 'a known reference is used'


def test_the_frechet_distance_of_shifted_features_is_the_squared_shift():
    x = noise(500, 6).double()
    assert frechet_distance(x, x + torch.tensor([1., 0, 0, 0, 0, 2.])) == pytest.approx(5, rel=1e-4)
    assert frechet_distance(x, 2*x) == pytest.approx(x.mean(0).square().sum().item() + torch.cov(x.T).trace().item(),
                                                     rel=1e-3)
