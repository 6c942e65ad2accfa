"""Every kind of image comes out as RGB, as torchvision's reference decodes it; every damaged file as one error."""

import warnings

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import default_loader

from blockvit.data.decode import UndecodableError, decode

COLOUR = (200, 30, 60)
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def palette(mode="P"):
    image = Image.new(mode, (8, 8), 1)
    image.putpalette([0, 0, 0, *COLOUR])
    return image


KINDS = {
    "RGB.png": (Image.new("RGB", (8, 8), COLOUR), {}, COLOUR),
    "RGB.jpg": (Image.new("RGB", (8, 8), COLOUR), {"quality": 95, "subsampling": 0}, COLOUR),
    "RGB.webp": (Image.new("RGB", (8, 8), COLOUR), {"lossless": True}, COLOUR),
    "grey.png": (Image.new("L", (8, 8), 77), {}, (77,) * 3),
    "grey.jpg": (Image.new("L", (8, 8), 77), {"quality": 95}, (77,) * 3),
    "grey with alpha.png": (Image.new("LA", (8, 8), (77, 10)), {}, (77,) * 3),
    "black and white.png": (Image.new("1", (8, 8), 1), {}, (255,) * 3),
    "alpha.png": (Image.new("RGBA", (8, 8), (*COLOUR, 0)), {}, COLOUR),
    "palette.png": (palette(), {}, COLOUR),
    "palette with alpha.png": (palette(), {"transparency": bytes([0, 128])}, COLOUR),
    "palette.gif": (palette(), {}, COLOUR),
    "CMYK.jpg": (Image.new("RGB", (8, 8), COLOUR).convert("CMYK"), {"quality": 95, "subsampling": 0}, COLOUR),
    "CMYK.tif": (Image.new("RGB", (8, 8), COLOUR).convert("CMYK"), {}, COLOUR),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb_as_in_the_reference(tmp_path, name):
    image, how, expected = KINDS[name]
    image.save(tmp_path / name, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # the module's own filter, which pytest undoes
        decoded = decode(tmp_path / name)
    assert (decoded.mode, decoded.size) == ("RGB", image.size)
    np.testing.assert_allclose(np.asarray(decoded), np.broadcast_to(expected, (8, 8, 3)), atol=4)  # JPEG is lossy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(np.asarray(decoded), np.asarray(default_loader(str(tmp_path / name))))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_a_pixel_keep_their_upper_eight(tmp_path, ending):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / f"grey.{ending}")
    decoded = np.asarray(decode(tmp_path / f"grey.{ending}"))
    assert np.array_equal(decoded, np.repeat(grey[..., None], 3, 2))


def test_thirty_two_bits_are_taken_for_sixteen(tmp_path):
    """Older versions of Pillow open images of 16 bits so."""
    Image.fromarray(np.array([[0, 257 * 100, 0xFFFF, 1 << 20]], np.int32)).save(tmp_path / "grey.tif")
    assert np.asarray(decode(tmp_path / "grey.tif"))[0, :, 0].tolist() == [0, 100, 255, 255]


def test_the_orientation_is_ignored_as_in_the_reference(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.fromarray(NOISE).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(decode(tmp_path / "turned.png")), NOISE)
    assert np.array_equal(np.asarray(default_loader(str(tmp_path / "turned.png"))), NOISE)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif", "ppm"])
def test_truncated_files(tmp_path, ending):
    path = tmp_path / f"noise.{ending}"
    Image.fromarray(NOISE).save(path)
    whole = path.read_bytes()
    for cut in (0, 1, 20, len(whole) // 2, len(whole) - 60):
        path.write_bytes(whole[:cut])
        with pytest.raises(UndecodableError, match=rf"cannot decode .*noise\.{ending}: .+; replace, remove or make it"):
            decode(path)


def test_files_with_flipped_bits_decode_or_raise_one_error(tmp_path):
    """Pillow's plugins raise whatever they stumble over: OSError, SyntaxError, ValueError, struct.error, ..."""
    rng, refused = np.random.default_rng(0), 0
    for ending in ("png", "jpg", "gif", "tif", "bmp"):
        path = tmp_path / f"noise.{ending}"
        Image.fromarray(NOISE).save(path)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[rng.integers(0, min(len(whole), 400), 6)] ^= np.uint8(1 << rng.integers(8))
            path.write_bytes(broken.tobytes())
            try:
                assert decode(path).mode == "RGB"
            except UndecodableError:
                refused += 1
    assert 20 < refused < 200


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"<html>404</html>", bytes(1000)], ids=["empty", "text", "html", "0"]
)
def test_files_that_are_no_image(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UndecodableError, match=r"cannot decode .*a\.jpg: cannot identify image file"):
        decode(tmp_path / "a.jpg")


def test_a_missing_file_and_a_folder(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name, problem in (("none.jpg", "No such file"), ("folder.jpg", "Is a directory")):
        with pytest.raises(UndecodableError, match=rf"cannot decode .*{name}: .*{problem}"):
            decode(tmp_path / name)


def test_an_image_too_large_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # from twice as many on, Pillow refuses
    Image.fromarray(NOISE).save(tmp_path / "bomb.png")
    with pytest.raises(UndecodableError, match="decompression bomb"):
        decode(tmp_path / "bomb.png")


def test_running_out_of_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def exhausted(path):
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        decode(tmp_path / "a.png")
