import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from albef_ds.data.images import ImageError, decode_image


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(size=(40, 30)):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray(ramp.astype(np.uint8))


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_header(width, height):
    """A JPEG whose frame header claims a size."""
    data = bytearray(encoded(colour(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_formats_from_path_and_bytes(tmp_path, kind):
    data = encoded(colour(), kind)
    path = tmp_path / "wrong_extension.jpg"  # the content decides
    path.write_bytes(data)
    for source in (path, str(path), data):
        image = decode_image(source)
        assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.array_equal(np.asarray(decode_image(path)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grey_and_one_bit():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(decode_image(encoded(grey, "PNG")))[..., 1], np.asarray(grey))
    assert set(np.asarray(decode_image(encoded(grey.convert("1"), "PNG"))).ravel()) == {0, 255}


def test_cmyk_jpeg_is_close_to_its_colours():
    image = Image.new("RGB", (16, 16), (200, 60, 30))
    got = np.asarray(decode_image(encoded(image.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(got.astype(int) - (200, 60, 30)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_cut(kind):
    values = np.linspace(0, 65535, 64 * 4).reshape(4, 64).astype(np.uint16)
    got = np.asarray(decode_image(encoded(Image.fromarray(values), kind)))
    assert np.array_equal(got[..., 0], values >> 8)


def test_transparency_is_dropped(recwarn):
    palette = colour().quantize(16)
    data = encoded(palette, "PNG", transparency=bytes(range(16)))
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(palette.convert("RGB")))
    rgba = colour().convert("RGBA")
    rgba.putalpha(0)
    assert np.array_equal(np.asarray(decode_image(encoded(rgba, "PNG"))), np.asarray(colour()))
    assert not recwarn.list


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode_image(encoded(colour((40, 30)), "JPEG", exif=exif)).size == (40, 30)


JPEG = encoded(colour((200, 200)), "JPEG")
PNG = encoded(colour((200, 200)), "PNG")
EPS = encoded(colour(), "EPS")


UNUSABLE = {
    "empty": (b"", "not an image of a known format"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an image of a known format"),
    "eps": (EPS, "not an image of a known format"),  # would start Ghostscript
    "zeros": (bytes(1000), "not an image of a known format"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "cannot be decoded: .*truncated"),
    "start of a jpeg": (JPEG[:30], "cannot be decoded|not an image"),
    "half a png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "truncated webp": (encoded(colour(), "WEBP")[:-20], "cannot be decoded|not an image"),
    "png bomb": (png_header(60_000, 60_000), "too many pixels"),
    "jpeg bomb": (jpeg_header(60_000, 60_000), "too many pixels"),
    "png without pixels": (png_header(2_000, 1_000), "cannot be decoded"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_used(tmp_path, kind):
    data, reason = UNUSABLE[kind]
    path = tmp_path / "some.jpg"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError, match=reason) as error:
            decode_image(source, key="the key")
        assert error.value.key == "the key" and str(error.value).startswith("the key: ")


def test_the_pixel_cap_is_checked_before_decoding(monkeypatch):
    data = encoded(colour(), "PNG")
    assert decode_image(data, max_pixels=1200).size == (40, 30)
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="40 x 30 pixels, more than the allowed 1,199"):
        decode_image(data, max_pixels=1199)


@pytest.mark.parametrize("path", ["missing.jpg", "nul\x00.jpg", "half\ud83d.jpg", ".", "x" * 5000])
def test_paths_that_are_no_files(tmp_path, path):
    with pytest.raises(ImageError) as error:
        decode_image(f"{tmp_path}/{path}")
    assert error.value.key == f"{tmp_path}/{path}"
    assert path != "missing.jpg" or error.value.reason == "the file does not exist"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on damaged TIFF
def test_every_cut_and_flipped_byte_is_an_image_or_an_image_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        whole = encoded(colour(), kind)
        for _ in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            data[rng.integers(min(len(data), 200))] ^= 1 << rng.integers(8)
            try:
                assert decode_image(bytes(data), max_pixels=10**6).mode == "RGB"
            except ImageError:
                pass


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("k", "r")))
    assert (error.key, error.reason, str(error)) == ("k", "r", "k: r")
