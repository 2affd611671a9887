"""Networks that judge images, from caches laid out as downloads leave them to a figure: published formats, random values."""
import json
import sys
from pathlib import Path

import lpips
import pytest
import timm
import torch
import torchvision
from exact import noise
from huggingface_hub import constants
from safetensors.torch import save_file
from torch_fidelity import calculate_metrics
from torchvision.io import write_png
from torchvision.transforms.v2 import functional as transforms

from spherical_lfm.decoder import DecoderTrainer, FinetuneConfig
from spherical_lfm.engine.features import get_distances, semantic_features
from spherical_lfm.engine.images import digits_images, to_uint8
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
from dry_run import hub_folder, write_inception  # noqa: E402

# architecture, file of its weights, layers that LPIPS looks at
BACKBONES = {
    'vgg': (torchvision.models.vgg16, 'vgg16-397923af.pth', (3, 8, 15, 22, 29)),
    'alex': (torchvision.models.alexnet, 'alexnet-owt-7be5be79.pth', (1, 4, 7, 9, 11)),
}


def drawn(shapes: dict, used: str) -> dict:
    "Values for the tensors that are used; the others share one zero, which takes no room on disk."
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=g)*(2/max(1, v[0].numel()))**.5 if used in k else torch.zeros(1).expand(v.shape)
            for k, v in shapes.items()}


@pytest.fixture(scope='module')
def caches(tmp_path_factory):
    "What downloading would have left: two folders, of torch and of the Hugging Face hub."
    root = tmp_path_factory.mktemp('caches')
    write_inception(root/'torch')
    for make, file, _ in BACKBONES.values():
        with torch.device('meta'): shapes = make().state_dict()
        torch.save(drawn(shapes, 'features'), root/'torch'/'hub'/'checkpoints'/file)
    with torch.device('meta'): shapes = timm.create_model('vit_small_patch14_dinov2', num_classes=0, img_size=518).state_dict()
    dinov2 = hub_folder(root/'huggingface'/'hub', 'timm/vit_small_patch14_dinov2.lvd142m')
    dinov2.mkdir(parents=True)
    save_file(drawn(shapes, ''), dinov2/'model.safetensors')
    return root


@pytest.fixture
def cached(caches, monkeypatch):
    "This process finds them."
    monkeypatch.setenv('TORCH_HOME', str(caches/'torch'))
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(caches/'huggingface'/'hub'))
    return caches


def lpips_by_hand(net: str, weights: Path, a, b):
    "Squared differences of channel-normalised features, weighted by the published heads, averaged over positions, summed."
    make, file, layers = BACKBONES[net]
    with torch.device('meta'): model = make()
    model.load_state_dict(torch.load(weights/file, weights_only=True, map_location='cpu'), assign=True)
    heads = torch.load(Path(lpips.__file__).parent/'weights'/'v0.1'/f'{net}.pth', weights_only=True, map_location='cpu')

    def depths(x):
        x = (x - torch.tensor([-.030, -.088, -.188]).view(3, 1, 1))/torch.tensor([.458, .448, .450]).view(3, 1, 1)
        for n, layer in enumerate(model.features[:layers[-1] + 1]):
            x = layer(x)
            if n in layers: yield x/(x.square().sum(1, keepdim=True) + 1e-10).sqrt()
    with torch.no_grad():
        return sum((heads[f'lin{k}.model.1.weight']*(p - q).square()).sum(1).mean((1, 2))
                   for k, (p, q) in enumerate(zip(depths(a), depths(b))))


@pytest.mark.parametrize('net', BACKBONES)
def test_lpips_is_the_published_formula_on_the_weights_of_torchs_cache(cached, net):
    a, b = noise(3, 3, 64, 64, scale=.4), noise(3, 3, 64, 64, seed=1, scale=.4)
    found, missing = get_distances(f'lpips-{net}')
    distance = found[f'lpips-{net}'](a, b)
    want = lpips_by_hand(net, cached/'torch'/'hub'/'checkpoints', a, b)
    assert not missing and want.min() > .01
    torch.testing.assert_close(distance, want, rtol=1e-3, atol=1e-5)
    assert found[f'lpips-{net}'](a, a).abs().max() == 0


def test_a_decoder_is_finetuned_with_lpips(cached, tmp_path):
    "The perceptual part of the loss of a step is LPIPS with VGG."
    config = FinetuneConfig(steps=1, batch_size=2, perceptual='lpips', log_every=1, flip=False)
    trainer = DecoderTrainer(load_tokenizer('digits'), digits_images('train')[0][:20], config, tmp_path)
    x = trainer.feed(0)
    recon = trainer.tokenizer.decode(trainer.tokenizer.encode(x))
    want = lpips_by_hand('vgg', cached/'torch'/'hub'/'checkpoints', recon.detach(), x).mean()
    trainer.fit(progress=False)
    assert trainer.log()[0]['perceptual'] == pytest.approx(want.item(), rel=1e-3) and want > 1e-5


def test_dinov2_of_the_hub_is_resampled_to_224_pixels(cached):
    "Published for 518 px: 37 x 37 positions become 16 x 16."
    x = noise(2, 3, 96, 96, scale=.6)
    net = timm.create_model('vit_small_patch14_dinov2', num_classes=0, img_size=518, dynamic_img_size=True).eval()
    file, = (cached/'huggingface').rglob('model.safetensors')
    timm.models.load_checkpoint(net, str(file))
    large = transforms.resize(x.clamp(-1, 1), [224, 224], transforms.InterpolationMode.BICUBIC, antialias=True).clamp(-1, 1)
    with torch.no_grad():
        want = net(transforms.normalize(large/2 + .5, [.485, .456, .406], [.229, .224, .225]))
        found = semantic_features('dinov2')(x)
    assert found.shape == (2, 384) and (want[0] - want[1]).abs().max() > .01
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


def test_a_probe_measures_with_lpips_and_dinov2(cached, tmp_path):
    "The command, with both in the caches."
    cli.slfm_probe(['digits', 'digits', '--size', '16', '--split', 'test', '--out', str(tmp_path/'out'), '--distances', 'lpips-vgg,dinov2',
                    '--count', '2', '--neighbours', 'any', '--sensitivity_count', '1'])
    found = json.loads((tmp_path/'out'/'probe.json').read_text())['summary']
    for name in ('lpips-vgg', 'dinov2'):
        moved = {swap: mean for swap, (mean, _, _) in found[name]['mean'].items()}
        assert moved['full'] > moved['radius'] > 0, (name, moved)


def test_an_evaluation_with_inception_is_torch_fidelitys(cached, tmp_path):
    "Two folders of images, through the command and through the library's own entry point."
    sets = {'made': digits_images('train')[0][:12], 'real': digits_images('test')[0][:12]} # KID takes subsets of 12: all of them, in whatever order
    for name, images in sets.items():
        (tmp_path/name).mkdir()
        for n, x in enumerate(to_uint8(images)): write_png(x, str(tmp_path/name/f'{n:02d}.png'))
    made, real = (str(tmp_path/name) for name in sets)
    cli.slfm_evaluate([made, real, '--out', str(tmp_path/'scores.json')])
    found = json.loads((tmp_path/'scores.json').read_text())
    want = calculate_metrics(
        input1=made, input2=real, cuda=False, fid=True, kid=True, isc=True, prc=True, kid_subset_size=12, cache=False,
        feature_extractor='inception-v3-compat', feature_layer_prc='2048', save_cpu_ram=True, verbose=False)
    for name, theirs in (('fid', 'frechet_inception_distance'), ('kid', 'kernel_inception_distance_mean'),
                         ('is', 'inception_score_mean'), ('precision', 'precision'), ('recall', 'recall')):
        assert found[name] == pytest.approx(want[theirs], rel=1e-3, abs=1e-6), name
    assert found['fid'] > 0 and found['sfid'] > 0 and found['protocol']['layer'] == '2048'
