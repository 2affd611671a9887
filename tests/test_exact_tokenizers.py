"""Transforms, statistics and the way through a tokenizer, by hand and against numpy, scikit-learn and scikit-image."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import blocks, noise
from skimage.metrics import peak_signal_noise_ratio

from spherical_lfm.engine.features import psnr
from spherical_lfm.engine.images import digits_images
from spherical_lfm.tokenizers import (
    LatentTransform,
    Tokenizer,
    channel_rows,
    channel_stats,
    load_tokenizer,
    measure_statistics,
    standardise,
)

MEAN, STD = [float(k) for k in range(12)], [1. + k/4 for k in range(12)]


def test_a_transform_by_hand():
    z = noise(2, 12, 4, 4)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (MEAN, STD))
    t = LatentTransform(scale=.5, shift=2., mean=MEAN, std=STD)
    want = ((z - 2)*.5 - mean)/std
    torch.testing.assert_close(t(z), want)
    torch.testing.assert_close(t.inverse(want), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('unpack', [False, True])
def test_a_packed_transform_by_hand(unpack):
    "Blocks of 2 x 2 positions become channels in the order of numpy's reshape; statistics belong to these."
    z = noise(2, 3, 4, 6)
    packed = z.numpy().reshape(2, 3, 2, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 3)
    want = (packed - np.reshape(MEAN, (1, 12, 1, 1)))/np.reshape(STD, (1, 12, 1, 1))
    t = LatentTransform(pack=2, mean=MEAN, std=STD, unpack=unpack)
    if unpack: want = want.reshape(2, 3, 2, 2, 2, 3).transpose(0, 1, 4, 2, 5, 3).reshape(2, 3, 4, 6)
    np.testing.assert_allclose(t(z), want, atol=1e-6)
    np.testing.assert_allclose(t.inverse(t(z)), z, atol=1e-5)
    assert t.channels(3) == (3 if unpack else 12) and t.stride == (1 if unpack else 2)


@pytest.mark.parametrize('spherical', [False, True])
def test_encode_and_decode_by_hand(spherical):
    x = noise(2, 3, 8, 8, scale=.4)
    t = blocks(spherical, 2., scale=.5, shift=.25)
    z = (F.pixel_unshuffle(x, 2) - .25)*.5
    if spherical: z = np.sqrt(12)*z/z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(t.encode(x), z)
    torch.testing.assert_close(t.raw_latents(x), F.pixel_unshuffle(x, 2))
    w = noise(2, 12, 4, 4, seed=1)
    inside = np.sqrt(12)*w/w.norm(dim=1, keepdim=True) if spherical else w
    torch.testing.assert_close(t.decode(w), 2*F.pixel_shuffle(inside/.5 + .25, 2))
    assert t.latent_shape(8, 6) == (12, 4, 3) and (t.d, t.downsample) == (12, 2)


def test_encoding_takes_the_mean_of_the_posterior():
    t, (x, _) = load_tokenizer('digits'), digits_images('test')
    posterior = t.autoencoder.encode(x[:4]).latent_dist
    want = (posterior.mean - t.transform.mean)/t.transform.std
    torch.testing.assert_close(t.encode(x[:4]), want)
    sampled = t.raw_latents(x[:4], torch.Generator().manual_seed(0))
    assert not torch.allclose(sampled, posterior.mean)
    assert (sampled - posterior.mean).abs().max() < 8*posterior.std.max()


def test_the_stored_digits_latents_are_standardised():
    z = load_tokenizer('digits').encode(digits_images('train')[0])
    rows = z.movedim(1, -1).flatten(0, -2).double().numpy()
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(rows.std(0), 1, atol=1e-3)


def test_channel_statistics_are_numpys():
    z = noise(5, 4, 3, 2)*torch.tensor([1., 2., 3., 4.]).view(1, -1, 1, 1) + 7
    rows = z.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 4)
    found = channel_stats(z)
    np.testing.assert_allclose(found['mean'], rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found['std'], rows.std(0), rtol=1e-9)


@pytest.mark.parametrize('pack', [1, 2])
def test_measured_statistics_standardise(pack):
    "Scale and shift are kept, and every channel of every place in a block ends with mean 0 and deviation 1."
    t, x = blocks(scale=.5, shift=.1), noise(40, 3, 8, 8)*torch.linspace(.1, 1, 8) + torch.linspace(0, 1, 8)
    moments = measure_statistics(t, x.split(15), pack)
    s = standardise(t, moments, pack)
    assert (s.transform.config['scale'], s.transform.config['shift']) == (.5, .1) and s.d == 12
    rows = channel_rows(t, t.raw_latents(x), pack).double().numpy()
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), atol=1e-9)
    out = F.pixel_unshuffle(s.encode(x), pack).double()
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 2, 3), unbiased=False), 1, atol=1e-5)
    torch.testing.assert_close(s.decode(s.encode(x)), x, atol=1e-5, rtol=1e-5)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits
    data = load_digits()
    for split, keep in (('train', np.arange(1797) % 5 != 4), ('test', np.arange(1797) % 5 == 4)):
        x, y = digits_images(split)
        assert np.array_equal(y, data.target[keep]) and x.shape[1:] == (3, 16, 16)
        small = F.avg_pool2d(x[:, :1], 2)[:, 0].numpy()[:, 1:-1, 1:-1]
        wide = np.pad(data.images[keep], ((0, 0), (1, 1), (1, 1)), mode='edge')/8 - 1
        blur = sum(w*np.roll(np.roll(wide, i, 1), j, 2) for i, a in ((-1, .125), (0, .75), (1, .125)) for j,
                   w in ((-1, a*.125), (0, a*.75), (1, a*.125)))
        np.testing.assert_allclose(small, blur[:, 2:-2, 2:-2], atol=1e-5)  # bilinear by 2, then the mean of 2 x 2
        assert torch.equal(x[:, 0], x[:, 2]) and x.min() >= -1 and x.max() <= 1


def test_psnr_is_scikit_images():
    a, b = (noise(3, 3, 9, 9, seed=s).clamp(-1, 1) for s in (0, 1))
    want = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2) for x, y in zip(a, b)]
    assert psnr(a, b).tolist() == pytest.approx(want, rel=1e-5)
    beyond = psnr(torch.full((1, 3, 2, 2), 5.), torch.ones(1, 3, 2, 2)).item()
    assert beyond == pytest.approx(10*np.log10(4e12), rel=1e-5), 'values beyond the range are clipped'


def test_identities_follow_content():
    one, other = blocks(), blocks(gain=2.)
    assert one.identity != other.identity and one.identity == blocks().identity
    assert blocks(spherical=True).identity != one.identity
    moved = blocks(shift=.1)
    assert moved.identity != one.identity and moved.latent_identity != one.latent_identity
    for t in (other, blocks(spherical=True)): assert t.latent_identity == one.latent_identity, 'latents know no decoder'


def test_digits_come_with_a_decoder_for_each_case(tmp_path):
    "The spherical decoder is the better one behind the projection, the control the better one without."
    x, _ = digits_images('test')
    vanilla, control = load_tokenizer('digits'), load_tokenizer('digits-control')
    spherical = load_tokenizer('digits', spherical=True)
    untuned = Tokenizer(vanilla.autoencoder, vanilla.transform, True)
    quality = {n: psnr(t.decode(t.encode(x)), x).mean().item() for n,
               t in (('vanilla', vanilla), ('control', control), ('spherical', spherical), ('untuned', untuned))}
    assert spherical.spherical and not control.spherical and not vanilla.spherical
    assert quality['untuned'] < quality['spherical'] < quality['control'] and quality['vanilla'] < quality['control']
    spherical.save_pretrained(tmp_path/'kept')
    kept = load_tokenizer(tmp_path/'kept')
    assert kept.spherical
    assert kept.identity == spherical.identity
    assert kept.transform.config == spherical.transform.config
