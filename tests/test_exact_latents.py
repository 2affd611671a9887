"""Orders, windows, flips and what is stored, image by image."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spherical_lfm.engine.images import ImageSource, digits_images, to_tensor
from spherical_lfm.engine.latents import Encoding, LatentDataset, LatentLoader, WindowOrder, encode_latents
from spherical_lfm.experiments import PRESETS, prepare_latents
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer, with_statistics


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "Images 100 to 29 of the digits, backwards, in shards of 30."
    folder = tmp_path_factory.mktemp('exact')/'latents'
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder, Encoding(shard_size=30, batch_size=20), order=torch.arange(100, 28, -1), progress=False)
    return folder


def test_an_image_is_its_centre_square():
    "Pixels as they lie where nothing is resized; the mean of areas where it is."
    pixels = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    x = to_tensor(Image.fromarray(pixels), 20)
    np.testing.assert_allclose(x.permute(1, 2, 0), pixels[:, 6:26]/127.5 - 1, atol=1e-6)
    flat = np.kron(np.array([[0, 100], [200, 255]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
    small = to_tensor(Image.fromarray(np.stack([flat]*3, 2)), 4)
    np.testing.assert_allclose(small[0, ::3, ::3], np.array([[0, 100], [200, 255]])/127.5 - 1, atol=.08)


@pytest.mark.parametrize('resident', [True, False])
@pytest.mark.parametrize('spherical', [True, False])
def test_stored_latents_are_those_of_the_images(cache, resident, spherical):
    images, labels = digits_images('train')
    tokenizer = load_tokenizer('digits', spherical=spherical)
    data, at = LatentDataset(cache, project=project if spherical else None, resident=resident), torch.tensor([0, 71, 29, 30, 45])
    flips = torch.tensor([False, True, True, False, True])
    z, y = data.batch(at, flips)
    x = images[100 - at]
    want = tokenizer.encode(torch.where(flips.view(-1, 1, 1, 1), x.flip(-1), x))
    torch.testing.assert_close(z, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(y, labels[100 - at]) and len(data) == 72 and data.classes == 10
    plain, _ = data.batch(at)
    torch.testing.assert_close(plain, tokenizer.encode(x), atol=1e-4, rtol=1e-4)
    assert data.index['count'] == 72 and [s['count'] for s in data.index['shards']] == [30, 30, 12]


@pytest.mark.parametrize('precision,dtype', [('float32', torch.float32), ('bf16', torch.bfloat16)])
def test_the_encoder_works_in_the_precision_asked_for(tmp_path, precision, dtype):
    tokenizer, seen = load_tokenizer('digits'), []
    tokenizer.autoencoder.encoder.conv_in.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    encode_latents(tokenizer, ImageSource('digits'), tmp_path/precision, Encoding(flip=False, dtype='bf16', precision=precision), order=torch.arange(20), progress=False)
    data = LatentDataset(tmp_path/precision, resident=True)
    assert set(seen) == {dtype}
    assert data.z['z'].dtype == torch.bfloat16
    assert data.batch(torch.arange(3))[0].dtype == torch.float32


def test_encoding_leaves_projection_to_the_reader(tmp_path):
    tokenizer = load_tokenizer('digits', spherical=True)
    encode_latents(tokenizer, ImageSource('digits'), tmp_path/'cache', Encoding(flip=False), order=torch.arange(20), progress=False)
    z, _ = LatentDataset(tmp_path/'cache').batch(torch.arange(20))
    assert z.norm(dim=1).std() > .1 and tokenizer.spherical


@pytest.mark.parametrize('count,window,block', [(100, 1000, 8), (100, 32, 8), (103, 40, 8), (64, 64, 16)])
def test_windows_make_permutations(count, window, block):
    order = WindowOrder(count, 10, 1, window, block)
    epochs = [order._shuffle(e) for e in (0, 1)]
    for e in epochs: assert sorted(e.tolist()) == list(range(count))
    assert not torch.equal(*epochs) and torch.equal(WindowOrder(count, 10, 1, window, block)._shuffle(1), epochs[1])
    if count > window:
        for part in epochs[0].split(window):
            assert len({n//block for n in part.tolist()}) <= math.ceil(window/block) + 1, 'few blocks at a time'
        jumps = (epochs[0].diff().abs() > 1).float().mean()
        assert jumps > .7, 'images within a window are shuffled'
        first = [WindowOrder(count, 10, s, window, block)._shuffle(0)[:window] for s in range(12)]
        assert len({frozenset(n//block for n in e.tolist()) for e in first}) > 6, 'blocks are shuffled'
    steps = torch.cat([order.indices(k) for k in range(count)])
    assert sorted(steps[:count].tolist()) == list(range(count)) and torch.equal(steps[:count], epochs[0])


def test_the_window_that_comes_next():
    order = WindowOrder(100, 10, 1, 32, 8)
    first, second = order._shuffle(0), order._shuffle(1)
    for step, number, rows in ((0, 0, first[32:64]), (3, 0, first[32:64]), (4, 1, first[64:96]), (9, 2, first[96:]),
                               (10, 4, second[32:64])):
        assert order.window_at(step) == number and torch.equal(order.images_of(number + 1), rows)
    assert torch.equal(order.images_of(4), second[:32]), 'after the last window of an epoch'


@pytest.mark.parametrize('flip', [0., .5, 1.])
def test_a_loader_gives_the_share_of_its_process_and_of_flips(cache, flip):
    data = LatentDataset(cache)
    plain, mirrored = (data.batch(torch.arange(72), torch.full((72,), f))[0].flatten(1) for f in (False, True))
    whole, half = LatentLoader(data, 24, 1, flip), LatentLoader(data, 24, 1, flip, slice(12, 24))
    count = 0
    for step in range(30):
        z, y = whole(step)
        at = whole.order.indices(step)
        gap = [(z.flatten(1) - s[at]).abs().amax(1) for s in (plain, mirrored)]
        assert (torch.minimum(*gap) == 0).all() and torch.equal(y, data.y[at])
        count += (gap[0] > gap[1]).sum().item()
        assert torch.equal(half(step)[0], z[12:])
    assert abs(count - flip*720) <= 4*math.sqrt(720*flip*(1 - flip))


def test_statistics_are_measured_where_there_are_none():
    tokenizer, source = load_tokenizer('digits'), ImageSource('digits')
    assert with_statistics(tokenizer, source, progress=False) is tokenizer
    measured = with_statistics(tokenizer, source, 'measure', limit=300, progress=False)
    images = torch.stack([x for x, _ in source.stream(source.shuffled(0), 300)])
    rows = measured.encode(images).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(rows.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones(16), atol=1e-3, rtol=0)


def test_a_shuffled_source_gives_every_image_once():
    source = ImageSource('digits', split='test')
    order = source.shuffled(3)
    assert sorted(order.tolist()) == list(range(359)) and not torch.equal(order, source.shuffled(4))
    images, labels = digits_images('test')
    found = list(source.batches(100, order, 150))
    assert [len(y) for _, y in found] == [100, 50]
    assert torch.equal(torch.cat([x for x, _ in found]), images[order[:150]])
    assert torch.equal(torch.cat([y for _, y in found]), labels[order[:150]])


class Sorted:
    "A source as long as ImageNet, sorted by class."
    listing, labels = SimpleNamespace(kind='folder'), torch.arange(1_281_167)*1000//1_281_167
    shuffled = ImageSource.shuffled

    def __len__(self): return len(self.labels)


def test_windows_and_batches_of_imagenet_mix_its_classes():
    stored = Sorted.labels[Sorted().shuffled(Encoding().seed)]
    y = stored[WindowOrder(len(stored), 256, 0)._shuffle(0)]
    for rows, size in ((y.split(65_536)[:-1], 65_536), (y.split(256)[:2000], 256)):
        classes = np.mean([len(part.unique()) for part in rows])
        assert classes == pytest.approx(1000*(1 - .999**size), rel=.02), 'as many as in a uniform draw'


@pytest.mark.parametrize('write', ['encode_latents', 'prepare_latents'])
def test_whoever_writes_a_cache_shuffles_it(tmp_path, write):
    images, labels = digits_images('train')
    by_class = labels.argsort(stable=True)
    for n in by_class.tolist():
        folder = tmp_path/'images'/str(labels[n].item())
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((images[n, 0] + 1)*127.5).round().byte().numpy()).save(folder/f'{n:04d}.png')
    source, tokenizer = ImageSource(tmp_path/'images', 16), load_tokenizer('digits')
    if write == 'encode_latents': encode_latents(tokenizer, source, tmp_path/'z', Encoding(flip=False), progress=False)
    else: prepare_latents(PRESETS['digits'], source, tmp_path/'z', progress=False)
    data = LatentDataset(tmp_path/'z')
    assert data.index['seed'] == 0 and torch.equal(data.y, labels[by_class][source.shuffled(0)])
    assert len(data.y[:100].unique()) == 10
    z, _ = data.batch(torch.arange(5))
    torch.testing.assert_close(z, tokenizer.encode(images[by_class][source.shuffled(0)[:5]]), atol=.1, rtol=0) # 8 bits
