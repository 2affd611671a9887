"""What lies in data/ loads, is what it says, and can be made again by the command that made it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spherical_lfm.experiments import PRESETS, prepare_latents
from spherical_lfm.fidelity import evaluate, extract_features, frechet_distance
from spherical_lfm.latents import ImageSource, LatentDataset, encode_latents
from spherical_lfm.probes import load_digit_features
from spherical_lfm.tokenizers import DATA, AutoencoderKL, digits_images, load_tokenizer, psnr

ROOT = Path(__file__).resolve().parent.parent


def test_the_command_that_makes_the_data(tmp_path):
    command = [sys.executable, str(ROOT/'scripts'/'make_data.py'), '--out', str(tmp_path), '--scale', '0.01']
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    for name in ('vanilla', 'spherical', 'control', 'features'):
        made, stored = ({p.name for p in (folder/'digits'/name).iterdir()} for folder in (tmp_path, DATA))
        assert made == stored
    images, _ = digits_images('test')
    retrained, stored = load_tokenizer(tmp_path/'digits'/'spherical'), load_tokenizer('digits', spherical=True)
    assert retrained.spherical and retrained.identity != stored.identity
    quality = lambda t: psnr(t.decode(t.encode(images)), images).mean()
    assert 5 < quality(retrained) < quality(stored)
    study = json.loads((tmp_path/'results'/'digits_comparison.json').read_text())
    assert {r['arm'] for r in study['rows']} == {'vanilla-linear', 'vanilla-shell', 'spherical-linear', 'spherical-slerp'}
    for r in study['rows']: assert r['steps'] == 12 and r['fid'] > 0 and 0 <= r['accuracy'] <= 1


def test_stored_tokenizers_share_latents_and_differ_in_decoders():
    vanilla, control, spherical = load_tokenizer('digits'), load_tokenizer('digits-control'), load_tokenizer('digits', spherical=True)
    assert vanilla.latent_identity == control.latent_identity == spherical.latent_identity
    assert len({t.identity for t in (vanilla, control, spherical)}) == 3


def test_projected_pipeline_is_close_to_the_control():
    images, _ = digits_images('test')
    quality = {n: psnr(t.decode(t.encode(images)), images).mean().item() for n, t in (
        ('control', load_tokenizer('digits-control')), ('spherical', load_tokenizer('digits', spherical=True)),
        ('untuned', load_tokenizer(DATA/'digits'/'vanilla', spherical=True)))}
    assert quality['untuned'] < quality['spherical'] and quality['control'] > 30


def test_broken_tokenizer_folders(tmp_path):
    load_tokenizer('digits').save_pretrained(tmp_path/'t')
    weights = tmp_path/'t'/'diffusion_pytorch_model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)): load_tokenizer(tmp_path/'t')
    weights.write_bytes(whole)
    config = tmp_path/'t'/'config.json'
    config.write_text(config.read_text().replace('"latent_channels": 16', '"latent_channels": 8'))
    with pytest.raises(ValueError, match='do not fit|statistics'): load_tokenizer(tmp_path/'t')
    with pytest.raises(FileNotFoundError, match='config.json'): load_tokenizer(tmp_path)
    (tmp_path/'config.json').write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match='not a diffusers autoencoder'): load_tokenizer(tmp_path)


def test_zero_tokens_are_refused_where_data_enters(tmp_path):
    tokenizer = load_tokenizer('digits', spherical=True)
    tokenizer.transform.mean.zero_()
    for p in (*tokenizer.autoencoder.quant_conv.parameters(),): p.data.zero_()
    with pytest.raises(ValueError, match='zero tokens'): tokenizer.encode(torch.zeros(1, 3, 16, 16))


def test_failed_encoding_keeps_the_old_cache(tmp_path):
    tokenizer = load_tokenizer('digits')
    index = encode_latents(tokenizer, ImageSource('digits'), tmp_path/'cache', flip=False, progress=False)
    source = ImageSource('digits')
    source.batches = lambda n, order=None: iter([(torch.full((2, 3, 16, 16), torch.nan), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(ValueError, match='NaN'): encode_latents(tokenizer, source, tmp_path/'cache', progress=False)
    assert LatentDataset(tmp_path/'cache', tokenizer.latent_identity).index == index
    assert [p.name for p in tmp_path.iterdir()] == ['cache']


def test_a_cache_of_other_images_is_not_reused(tmp_path):
    count = lambda split: (prepare_latents(PRESETS['digits'], ImageSource('digits', 16, split), tmp_path/'cache', progress=False), len(LatentDataset(tmp_path/'cache')))[1]
    assert count('train') == 1438
    stamp = (tmp_path/'cache'/'index.json').stat().st_mtime_ns
    assert count('train') == 1438 and (tmp_path/'cache'/'index.json').stat().st_mtime_ns == stamp
    assert count('test') == 359


def test_flips_are_latents_of_mirrored_images(tmp_path):
    tokenizer = load_tokenizer('digits')
    encode_latents(tokenizer, ImageSource('digits'), tmp_path/'cache', flip=True, progress=False)
    images, _ = digits_images('train')
    z, _ = LatentDataset(tmp_path/'cache').batch(torch.tensor([5, 6]), torch.tensor([True, False]))
    want = torch.stack([tokenizer.encode(images[5:6].flip(-1))[0], tokenizer.encode(images[6:7])[0]])
    torch.testing.assert_close(z, want, atol=1e-4, rtol=0)


def test_flux2_statistics_come_from_the_model(tmp_path):
    from diffusers import AutoencoderKLFlux2
    small = AutoencoderKLFlux2(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2,
                               layers_per_block=1, norm_num_groups=4, latent_channels=8, patch_size=(2, 2))
    small.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    small.bn.running_var.uniform_(.5, 2, generator=torch.Generator().manual_seed(1))
    small.save_pretrained(tmp_path/'flux2')
    tokenizer = load_tokenizer(tmp_path/'flux2')
    raw = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(2))
    packed = raw.view(2, 8, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 32, 2, 3)
    want = (packed - small.bn.running_mean.view(1, -1, 1, 1))/(small.bn.running_var + small.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(torch.nn.functional.pixel_unshuffle(tokenizer.transform(raw), 2), want)
    torch.testing.assert_close(tokenizer.transform.inverse(tokenizer.transform(raw)), raw, atol=1e-5, rtol=0)


def test_evaluate_agrees_with_features_and_depends_on_what_it_records():
    train, _ = digits_images('train')
    test, _ = digits_images('test')
    figures = evaluate(test, train, 'digits', 'digits train')
    direct = frechet_distance(extract_features(test, 'digits'), extract_features(train, 'digits'))
    assert figures['fid'] == pytest.approx(direct, rel=1e-3)
    assert figures['protocol']['samples'] == 359 and figures['protocol']['extractor'] == 'digits'
    assert 4 < figures['is'] <= 10 and figures['precision'] > .5


@pytest.mark.parametrize('rank', [64, 40])
def test_frechet_distance_against_scipy(rank):
    import numpy as np
    from scipy.linalg import sqrtm
    g = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(900, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, 64, generator=g, dtype=torch.float64) + s for s in (0, .3))
    A, B = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    nudge = 1e-9*np.eye(64) # scipy's root needs a little help where covariances are singular
    want = ((a.mean(0) - b.mean(0))**2).sum().item() + np.trace(A + B - 2*sqrtm((A + nudge) @ (B + nudge)).real)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-3)


def test_digit_features_agree_with_their_record():
    images, labels = digits_images('test')
    assert (load_digit_features().logits(images).argmax(1) == labels).float().mean() > .97


def test_tokenizer_of_any_diffusers_class(tmp_path):
    AutoencoderKL(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, norm_num_groups=4,
                  latent_channels=4, scaling_factor=.3, shift_factor=.1).save_pretrained(tmp_path/'vae')
    t = load_tokenizer(tmp_path/'vae', spherical=True)
    z = t.encode(torch.rand(2, 3, 8, 12)*2 - 1)
    assert z.shape == (2, 4, 4, 6) and torch.allclose(z.norm(dim=1), torch.tensor(2.))
    assert t.decode(z).shape == (2, 3, 8, 12)
