"""Images and labels as people have them: what is meant, or one sentence."""
import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spherical_lfm.engine.images import ImageSource, digits_images, number_labels, open_source, to_tensor
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.tokenizers import load_tokenizer

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'
COLOURS = {'red': (255, 0, 0), 'lime': (0, 255, 0), 'blue': (0, 0, 255), 'white': (255, 255, 255)}


def put(root: Path, *names: str, colour: str = 'red'):
    "Small images at these places."
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (12, 10), colour).save(root/name, 'png')


def png(colour: str = 'red') -> bytes:
    b = io.BytesIO()
    Image.new('RGB', (12, 10), colour).save(b, 'png')
    return b.getvalue()


def names_of(source: ImageSource) -> list: return [Path(p).name for p in source.listing.rows]


def labelled(source: ImageSource) -> dict: return Counter(source.classes[n] for n in source.labels.tolist())


# --- folders: (what lies there, split asked for, classes with counts or None, words of the refusal) ---

LAYOUTS = {
    'class folders': (['a/1.png', 'a/2.png', 'b/1.png'], '', {'a': 2, 'b': 1}),
    'a bullet train': (['train/1.png', 'plane/1.png', 'car/1.png'], '', {'car': 1, 'plane': 1, 'train': 1}),
    'a class called test': (['test/1.png', 'cat/1.png', 'cat/2.png'], '', {'cat': 2, 'test': 1}),
    'classes train and val that hold folders': (['train/x/1.png', 'val/y/1.png', 'car/1.png'], '', 'could be classes as well.*--split train.*--split none'),
    'deeper folders': (['a/x/1.png', 'a/y/z/2.png', 'b/1.png'], '', {'a': 2, 'b': 1}),
    'one base name twice': (['a/cat/1.png', 'b/cat/1.png'], '', {'a': 1, 'b': 1}),
    'one stray': (['a/1.png', 'a/2.png', 'b/1.png', 'contact.png'], '', {'a': 2, 'b': 1}),
    'many strays': (['a/1.png', 'b/1.png', '1.png', '2.png', '3.png'], '', '3 images lie directly in'),
    'numbers': ([f'{n}/x.png' for n in range(1, 13)], '', {str(n): 1 for n in range(1, 13)}),
    'splits': (['train/a/1.png', 'train/b/1.png', 'val/a/9.png'], '', {'a': 1, 'b': 1}),
    'the other split': (['train/a/1.png', 'train/b/1.png', 'val/a/9.png'], 'val', {'a': 1}),
    'splits taken for classes': (['train/a/1.png', 'val/a/9.png'], 'none', {'train': 1, 'val': 1}),
    'no such split': (['train/a/1.png', 'val/a/9.png'], 'test', "no folder 'test' with images, only train, val"),
    'flat splits': (['train/1.png', 'test/1.png'], '', 'could be classes as well'),
    'a flat split asked for': (['train/1.png', 'train/2.png', 'test/1.png'], 'train', {}),
    'flat': (['1.png', '2.png'], '', {}),
    'train alone': (['train/1.png', 'train/2.png'], '', {}),
    'odd names': (['[a]*?/1.png', 'a#b/1.png', 'x::y/1.png', 'a b/1.png'], '', {'[a]*?': 1, 'a b': 1, 'a#b': 1, 'x::y': 1}),
    'hidden': (['a/1.png', 'b/1.png', '.git/1.png', 'a/._1.png', '__MACOSX/a/1.png'], '', {'a': 1, 'b': 1}),
    'nothing': (['a/notes.txt'], '', 'holds no images.*1 .txt'),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_what_a_folder_means(name, tmp_path):
    files, split, want = LAYOUTS[name]
    root = tmp_path/'set [1] #2*'
    put(root, *files)
    if isinstance(want, str):
        with pytest.raises((ValueError, FileNotFoundError), match=want): ImageSource(root, 8, split)
        return
    source = ImageSource(root, 8, split)
    assert len(list(source)) == len(source) == len(source.labels)
    assert list(labelled(source).items()) == list(want.items()) if want else source.classes == []
    assert source.understood['labels'] == bool(want) and ('no classes' in source.describe()) == (not want)


def test_captions_beside_images_change_nothing(tmp_path):
    put(tmp_path, 'a/1.png', 'b/1.png')
    (tmp_path/'metadata.csv').write_text('file_name,text\na/1.png,a cat\n')
    assert labelled(ImageSource(tmp_path, 8)) == {'a': 1, 'b': 1}


def test_links_are_followed_and_those_that_lead_back_are_not(tmp_path):
    put(tmp_path/'far', 'cats/1.png', 'cats/2.png', 'dogs/1.png')
    root = tmp_path/'set'
    root.mkdir()
    (root/'cat').symlink_to(tmp_path/'far'/'cats')
    (root/'dog').mkdir()
    (root/'dog'/'linked.png').symlink_to(tmp_path/'far'/'dogs'/'1.png')
    (root/'dog'/'again').symlink_to(root)
    (root/'dog'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    source = ImageSource(root, 8)
    assert labelled(source) == {'cat': 2, 'dog': 1} and source.understood['skipped'] == {'broken link': 1}


def test_what_is_left_out_is_counted_and_named(tmp_path):
    put(tmp_path, 'a/1.png', 'a/2.heic', 'a/3.heic', 'b/1.png', 'b/noending')
    (tmp_path/'b'/'broken.png').write_bytes(png()[:40])
    (tmp_path/'c').mkdir()
    source = ImageSource(tmp_path, 8)
    assert len(list(source)) == 2 and [s.split(':')[0] for s in source.skipped] == ['broken.png']
    assert source.understood['skipped'] == {'.heic': 2, 'without an ending': 1, 'unreadable': 1}
    assert any('no images in c' in note for note in source.understood['notes'])


def test_unequal_single_and_empty_classes_are_said(tmp_path):
    put(tmp_path/'one', 'only/1.png')
    put(tmp_path/'uneven', 'a/1.png', *(f'b/{n}.png' for n in range(11)))
    assert 'one class only: only' in ImageSource(tmp_path/'one', 8).describe()
    assert 'very unequal classes: b has 11 images, a has 1' in ImageSource(tmp_path/'uneven', 8).describe()


def test_digits_and_a_folder_of_that_name(tmp_path, monkeypatch):
    put(tmp_path, 'digits/a/1.png', 'digits/b/1.png')
    assert ImageSource('digits').understood['classes']['3'] == int((digits_images('train')[1] == 3).sum())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='write ./digits'): ImageSource('digits')
    assert ImageSource('./digits', 8).classes == ImageSource(Path('digits'), 8).classes == ['a', 'b']
    assert len(list(ImageSource('./digits', 8))) == 2 # read from a relative path


@pytest.mark.parametrize('source,words', [('nowhere/at/all', 'no images at'), ('/absent', 'no images at'), ('x.parquet', 'no images at'), ('{}/note.txt', 'is a single file')])
def test_what_is_no_source(source, words, tmp_path):
    (tmp_path/'note.txt').write_text('x')
    with pytest.raises((ValueError, FileNotFoundError), match=words): open_source(source.format(tmp_path))


# --- tables ---

def table(path: Path, metadata: dict | None = None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def cells(n: int) -> list: return [{'bytes': png(c), 'path': f'{k}.png'} for k, c in zip(range(n), list(COLOURS)*n)]


NAMED = {b'huggingface': b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["crane", "owl", "crane"]}}}}'}
TABLES = { # columns, metadata, options, classes of the rows or the refusal
    'numbers': (dict(image=3, label=[0, 1, 0]), None, {}, ['0', '1', '0']),
    'from one': (dict(image=3, label=[1, 12, 2]), None, {}, ['1', '12', '2']),
    'very large': (dict(image=3, label=[3_000_000_000, 7, 7]), None, {}, ['3000000000', '7', '7']),
    'names in the file': (dict(image=3, label=[0, 2, 2]), NAMED, {}, ['crane (0)', 'crane (2)', 'crane (2)']),
    'beyond the names': (dict(image=3, label=[0, 3, 2]), NAMED, {}, 'goes up to 3, but the file names classes 0 to 2'),
    'strings': (dict(image=3, label=['c10', 'c9', 'c9']), None, {}, ['c10', 'c9', 'c9']),
    'labels': (dict(image=3, labels=[0, 1, 1]), None, {}, ['0', '1', '1']),
    'fine_label': (dict(image=3, fine_label=[0, 1, 1]), None, {}, ['0', '1', '1']),
    'fine and coarse': (dict(image=3, fine_label=[0, 1, 1], coarse_label=[0, 0, 0]), None, {}, 'several columns.*give --label_column'),
    'coarse': (dict(image=3, fine_label=[0, 1, 1], coarse_label=[4, 4, 5]), None, dict(label_column='coarse_label'), ['4', '4', '5']),
    'an unusual name': (dict(image=3, species=['x', 'y', 'x']), None, dict(label_column='species'), ['x', 'y', 'x']),
    'no labels': (dict(image=3, caption=['x', 'y', 'z']), None, {}, []),
    'none wanted': (dict(image=3, label=[0, 1, 1]), None, dict(label_column='none'), []),
    'absent': (dict(image=3, label=[0, 1, 1]), None, dict(label_column='kind'), "no column 'kind', only label, image"),
    'img': (dict(img=3, label=[0, 1, 1]), None, {}, ['0', '1', '1']),
    'pixels': (dict(pixels=3, label=[0, 1, 1]), None, {}, 'give --image_column'),
    'pixels wanted': (dict(pixels=3, label=[0, 1, 1]), None, dict(image_column='pixels'), ['0', '1', '1']),
    'fractions': (dict(image=3, label=[0., 1.7, 1.]), None, {}, "holds '1.7', which is no class"),
    'whole floats': (dict(image=3, label=[0., 2., 1.]), None, {}, ['0', '2', '1']),
    'lists': (dict(image=3, label=[[0], [1], [1, 2]]), None, {}, 'which is no class'),
    'truth values': (dict(image=3, label=[True, False, True]), None, {}, ['1', '0', '1']),
    'a label that is null': (dict(image=3, label=[0, None, 1]), None, {}, ['0', '1']),
    'minus one': (dict(image=3, label=[0, -1, 1]), None, {}, ['0', '1']),
    'no label at all': (dict(image=3, label=pa.array([-1, -1, -1])), None, {}, 'holds no classes at all'),
}


@pytest.mark.parametrize('name', TABLES)
def test_what_a_table_means(name, tmp_path):
    columns, metadata, options, want = TABLES[name]
    image = next(k for k, v in columns.items() if v == 3)
    path = table(tmp_path/'set.parquet', metadata, **{k: v for k, v in columns.items() if k != image} | {image: cells(3)})
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want): ImageSource(path, 8, **options)
        return
    source = ImageSource(path, 8, **options)
    assert [source.classes[y] for _, y in source] == want if want else source.classes == []
    assert source.understood['columns']['image'] == image
    if len(want) == 2: assert source.understood['skipped'] == {'without a label': 1}


def test_ids_are_no_classes():
    with pytest.raises(ValueError, match='500 different values in 600 rows'): number_labels([n % 500 for n in range(600)])
    assert len(number_labels([n % 200 for n in range(600)])[1]) == 200


def test_images_of_a_table_that_are_not_there(tmp_path):
    path = table(tmp_path/'a.parquet', image=[cells(1)[0], None, {'bytes': None, 'path': None}, {'bytes': b'x', 'path': 'x.png'}], label=[0, 1, 1, 0])
    source = ImageSource(path, 8)
    assert [y for _, y in source] == [0] and [s.split(':')[0] for s in source.skipped] == ['row 1', 'row 2', 'x.png']
    with pytest.raises(ValueError, match='image 1 of .* cannot be read: row 1: no image'): source[1]


def test_several_files_and_splits_of_a_table(tmp_path):
    for k in range(3): table(tmp_path/'hub'/'data'/f'train-{k:05d}-of-00003.parquet', image=cells(2), label=[k, k])
    table(tmp_path/'hub'/'data'/'test-00000-of-00001.parquet', image=cells(1), label=[5])
    source = ImageSource(tmp_path/'hub', 8)
    assert source.split == 'train' and source.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(list(source)) == 6
    assert ImageSource(tmp_path/'hub', 8, 'test').classes == ['5'] and len(ImageSource(tmp_path/'hub', 8, 'none')) == 7
    with pytest.raises(ValueError, match="no parquet files of split 'val', only of test, train"): ImageSource(tmp_path/'hub', 8, 'val')
    table(tmp_path/'hub'/'data'/'train-00003-of-00003.parquet', picture=cells(1))
    with pytest.raises(ValueError, match='has other columns than'): ImageSource(tmp_path/'hub', 8)
    put(tmp_path, 'both/a.png')
    table(tmp_path/'both'/'x.parquet', image=cells(1))
    with pytest.raises(ValueError, match='parquet files and images'): ImageSource(tmp_path/'both', 8)


@pytest.mark.parametrize('name', ['a[1]', 'b*?', 'c::d', 'e#f', '{g}'])
def test_odd_names_of_parquet_files(name, tmp_path):
    for other, n in ((name, 2), (name[:1], 3), (f'{name[:1]}1', 4)): table(tmp_path/f'{other}.parquet', image=cells(n), label=list(range(n)))
    assert len(ImageSource(tmp_path/f'{name}.parquet', 8)) == len(ImageSource(tmp_path/f'{name}.parquet', 8).labels) == 2


@pytest.mark.parametrize('name', ['plain', 'a[1]'])
def test_a_table_that_was_replaced_is_read_anew(name, tmp_path):
    for colours in (['red', 'blue'], ['lime', 'white']):
        table(tmp_path/f'{name}.parquet', image=[{'bytes': png(c), 'path': None} for c in colours], label=[0, 1])
        found = [x[:, 0, 0].tolist() for x, _ in ImageSource(tmp_path/f'{name}.parquet', 8)]
        assert found == [pytest.approx([v/127.5 - 1 for v in COLOURS[c]]) for c in colours]


# --- pixels ---

def saved(image: Image.Image, path: Path, **options) -> Image.Image:
    image.save(path, **options)
    return Image.open(path)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(suffix, orientation, tmp_path):
    upright = Image.new('RGB', (32, 32), 'black')
    upright.paste((255, 255, 255), (0, 0, 16, 16)) # upper left
    upright.paste((128, 128, 128), (16, 0, 32, 16)) # upper right
    T = Image.Transpose
    inverse = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {'jpg': dict(quality=95), 'png': {}, 'webp': dict(lossless=True)}[suffix]
    x = to_tensor(saved(upright if inverse is None else upright.transpose(inverse), tmp_path/f'x.{suffix}', exif=exif, **options), 32)
    corners = x[0, [8, 8, 24, 24], [8, 24, 8, 24]]
    torch.testing.assert_close(corners, torch.tensor([1., 1/255, -1., -1.]), atol=.02, rtol=0)


@pytest.mark.parametrize('values,mode,want', [
    (np.full((4, 4), 65535, np.uint16), None, 1.), (np.full((4, 4), 32768, np.uint16), None, 2*128/255 - 1), (np.full((4, 4), .25, np.float32), None, 2*64/255 - 1),
    (np.full((4, 4), 65535, np.int32), None, 1.), (np.full((4, 4), 70_000, np.int32), None, 'values from 70000'), (np.full((4, 4), 1.5, np.float32), None, 'not 0 to 1'), (np.full((4, 4), np.nan, np.float32), None, 'not 0 to 1')])
def test_deep_grey(values, mode, want, tmp_path):
    image = saved(Image.fromarray(values), tmp_path/'x.tiff')
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want): to_tensor(image, 4)
    else: assert to_tensor(image, 4).unique().tolist() == pytest.approx([want], abs=1e-6)


def test_twelve_bits(tmp_path):
    "A TIFF of 12 bits per sample, written by hand: full white is 4095."
    import struct
    pixels = bytes([0xff, 0xff, 0xff])*8 # 4 x 4 values of 12 bits, all ones
    tags = [(256, 3, 4), (257, 3, 4), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 4), (279, 4, len(pixels))]
    entries = b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in tags)
    (tmp_path/'x.tiff').write_bytes(b'II*\0' + struct.pack('<I', 8 + len(pixels)) + pixels + struct.pack('<H', len(tags)) + entries + b'\0'*4)
    assert to_tensor(Image.open(tmp_path/'x.tiff'), 4).unique().tolist() == [1.]


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA', 'P', 'L', 'RGB'])
def test_transparency_lies_over_white(mode, tmp_path):
    if mode in ('P', 'L', 'RGB'): image = saved(Image.new(mode, (4, 4), 0), tmp_path/'x.png', transparency=(0, 0, 0) if mode == 'RGB' else 0)
    else: image = Image.new('RGBA', (4, 4), (0, 0, 0, 0)).convert(mode)
    assert to_tensor(image, 4).unique().tolist() == [1.]
    half = Image.new('RGBA', (4, 4), (0, 0, 0, 51))
    assert to_tensor(half, 4).unique().tolist() == pytest.approx([2*204/255 - 1])


def test_other_modes_and_frames(tmp_path):
    assert to_tensor(Image.new('CMYK', (4, 4), (0, 255, 255, 0)), 4)[:, 0, 0].tolist() == pytest.approx([1., -1., -1.])
    assert to_tensor(Image.new('1', (4, 4), 1), 4).unique().tolist() == [1.]
    frames = [Image.new('RGB', (4, 4), c) for c in ('white', 'black')]
    assert to_tensor(saved(frames[0], tmp_path/'x.gif', save_all=True, append_images=frames[1:]), 4).unique().tolist() == [1.]


# --- what caches and figures belong to ---

def test_fingerprint_and_content(tmp_path):
    put(tmp_path/'one'/'train', 'a/1.png', 'b/1.png')
    put(tmp_path/'two'/'train', 'a/1.png', 'b/1.png')
    one, two = ImageSource(tmp_path/'one'/'train', 8), ImageSource(tmp_path/'two'/'train', 8)
    assert one.content == two.content and one.fingerprint != two.fingerprint == ImageSource(tmp_path/'two'/'train', 8).fingerprint
    before = one.fingerprint, one.content
    os.utime(tmp_path/'one'/'train'/'a'/'1.png', ns=(1, 1))
    assert (one.fingerprint != before[0], one.content) == (True, before[1])
    Image.new('RGB', (13, 10), 'blue').save(tmp_path/'one'/'train'/'a'/'1.png', 'bmp')
    assert ImageSource(tmp_path/'one'/'train', 8).content != before[1] != ImageSource(tmp_path/'two'/'train', 16).content


def test_a_killed_encoding_of_other_images_is_not_continued(tmp_path):
    "Two folders of one last name and count: shards of the first do not enter the cache of the second."
    images, labels = digits_images('train')
    for where, first in (('one', 0), ('two', 100)):
        for n in range(48):
            (tmp_path/where/'train').mkdir(parents=True, exist_ok=True)
            Image.fromarray(((images[first + n, 0] + 1)*127.5).byte().numpy()).save(tmp_path/where/'train'/f'{n:02d}.png')
    tokenizer, source = load_tokenizer('digits'), ImageSource(tmp_path/'one'/'train', 16)
    original, calls = source.stream, []
    def failing(order=None, limit=None):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return original(order, limit)
    source.stream = failing
    with pytest.raises(KeyboardInterrupt): encode_latents(tokenizer, source, tmp_path/'cache', Encoding(flip=False, shard_size=16), progress=False)
    encode_latents(tokenizer, ImageSource(tmp_path/'two'/'train', 16), tmp_path/'cache', Encoding(flip=False, shard_size=16), progress=False)
    encode_latents(tokenizer, ImageSource(tmp_path/'two'/'train', 16), tmp_path/'plain', Encoding(flip=False), progress=False)
    a, b = (LatentDataset(tmp_path/n, resident=True).z['z'] for n in ('cache', 'plain'))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_classes_without_images_keep_their_numbers(tmp_path):
    "A set whose file names three classes trains three, even if the last has no image."
    path = table(tmp_path/'set.parquet', NAMED, image=[{'bytes': png(), 'path': None}]*12, label=[0, 1]*6)
    encode_latents(load_tokenizer('digits'), ImageSource(path, 16), tmp_path/'z', Encoding(flip=False), progress=False)
    assert LatentDataset(tmp_path/'z').classes == 3
    assert '1 of 3 classes have no images: crane (2)' in ImageSource(path, 16).describe()


def test_commands_say_what_they_understood(tmp_path):
    put(tmp_path, 'set/train/1/a.png', 'set/train/10/a.png', 'set/train/2/a.png', 'set/val/1/a.png')
    line = [sys.executable, '-c', 'from spherical_lfm.tools.cli import slfm_encode; slfm_encode()', 'digits', str(tmp_path/'set'), str(tmp_path/'z'), '--size', '16', '--no_flip', '--split', 'train']
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert re.search(r'3 images at 16 px, split train, 3 classes \(1: 1, 2: 1, 10: 1\)', result.stderr)
    assert LatentDataset(tmp_path/'z').index['source']['classes'] == {'1': 1, '2': 1, '10': 1}


@pytest.mark.skipif(not (SHARED/'data').exists(), reason='needs the photographs beside the checkout')
def test_real_tables():
    cifar, photos = ImageSource(SHARED/'data'/'cifar10_test.parquet', 32), ImageSource(SHARED/'data'/'imagenet_samples_256.parquet', 64)
    assert cifar.classes[:2] == ['airplane', 'automobile'] and labelled(cifar)['truck'] == 1000
    assert len(photos.classes) == 1000 and photos.labels[:250].sort().values.tolist() == list(range(0, 1000, 4))
    assert any('750 of 1000 classes have no images' in n for n in photos.understood['notes'])
