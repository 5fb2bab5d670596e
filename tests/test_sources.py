"""What is predicted on: found, named, and read, whatever users point at; one bad image does not stop the others."""

import gzip
import http.client
import http.server
import os
import shutil
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dino_hf.common import downloads, image_origins
from dino_hf.common.images import UnknownRange, to_rgb
from dino_hf.inference import sources, videos
from dino_hf.inference.sources import End, Failure, Picture, Source, find_sources, read_image, read_sources
from dino_hf.inference.videos import VideoWriter, camera_input, read_frames, video_info
from inference_toys import noise

RED, GREEN, BLUE, WHITE = (250, 10, 20), (10, 240, 30), (20, 30, 230), (255, 255, 255)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Images in folders, a video, and files that are neither."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("10.png", "9.PNG", "a/2.jpg", "a/1.jpg", "b/1.jpg", "b/deep/1.webp", ".hidden/1.png", ".1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(50, 30, len(name)).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "empty").mkdir()
    write_video(root / "b" / "clip.mp4", 9)
    return root


def write_video(path, num_frames: int, size=(64, 48), rate=Fraction(30000, 1001)) -> None:
    """Its frames get brighter by 16."""
    writer = VideoWriter(path, size, rate)
    for number in range(num_frames):
        writer.write(Image.new("RGB", size, (16 * number,) * 3))
    writer.close()


def names(*arguments, **settings) -> list[str]:
    return [source.name for source in find_sources(*arguments, **settings)]


def test_a_folder_stands_for_all_in_it_in_the_order_of_people(tree):
    expected = ["9.PNG", "10.png", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/clip.mp4", "b/deep/1.webp"]
    assert names(tree) == expected
    assert names(str(tree) + "/") == expected
    assert [source.kind for source in find_sources([tree / "b"])] == ["image", "video", "image"]
    assert names(tree, exclude=tree / "b") == expected[:4]


def test_names_are_relative_to_what_sources_have_in_common_and_differ(tree):
    assert names(tree / "a" / "1.jpg") == ["1.jpg"]
    assert names([tree / "a" / "1.jpg", tree / "b" / "1.jpg"]) == ["a/1.jpg", "b/1.jpg"]
    assert names([tree / "b", tree / "a"]) == ["b/1.jpg", "b/clip.mp4", "b/deep/1.webp", "a/1.jpg", "a/2.jpg"]
    assert names([tree / "10.png", str(tree / "*.png"), tree / "a" / ".." / "10.png"]) == ["10.png"]
    images = [noise(40, 30), noise(40, 30), np.zeros((20, 30, 3), dtype=np.uint8)]
    assert names([*images, images[0]]) == ["image-1", "image-2", "image-3", "image-4"]
    addresses = [
        "http://x.org/a/1.jpg?size=3",
        "https://x.org/b/1.jpg",
        "http://me:secret@x.org/",
        "http://x.org/c%20d/%2e%2e",
    ]
    assert names(addresses) == ["1.jpg", "1-2.jpg", "x_org", "x_org-2"]


def test_patterns_are_found_quoted_too(tree, monkeypatch):
    assert names(str(tree / "*" / "1.jpg")) == ["a/1.jpg", "b/1.jpg"]
    assert names(str(tree / "**" / "*.jpg")) == ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
    assert len(names(str(tree / "**"))) == 7
    assert names(str(tree / "[ab]")) == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/clip.mp4", "b/deep/1.webp"]
    assert names(str(tree / "**" / "*.jpg"), exclude=tree / "b") == ["a/1.jpg", "a/2.jpg"]
    monkeypatch.chdir(tree)
    assert names("a/?.jpg") == ["1.jpg", "2.jpg"]
    (tree / "empty" / "[1].png").touch()
    assert names("empty/[1].png") == ["[1].png"]  # a file of that name is no pattern
    (tree / "empty" / "[1].png").unlink()


def test_a_number_is_a_camera_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_sources(["0", 2]) == [Source("camera-0", 0, "camera"), Source("camera-2", 2, "camera")]
    (tmp_path / "0").mkdir()
    noise(30, 20).save(tmp_path / "0" / "x.png")
    assert names("0") == ["x.png"]
    assert camera_input(1, "linux") == ("/dev/video1", "v4l2")
    assert camera_input(1, "darwin") == ("1", "avfoundation")
    assert find_sources("rtsp://10.0.0.1/live")[0].kind == "camera"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("none.jpg", FileNotFoundError, "There is no file or folder none.jpg"),
        ("none/*.jpg", FileNotFoundError, r"No image or video matches none/\*.jpg"),
        ("{tree}/*.txt", FileNotFoundError, "No image or video matches"),
        ("{tree}/empty", FileNotFoundError, "The folder .*empty and its subfolders have no image or video"),
        ("ftp://x.org/1.jpg", ValueError, "is an address of kind 'ftp'; known are http, https, rtsp"),
        ("http://[x.org/1.jpg", ValueError, "is not a valid address: Invalid IPv6 URL."),
        ("https://", ValueError, "https:// is not a valid address: it has no host."),
        ("", ValueError, "Source 1 is empty; give a path"),
        (3.5, ValueError, "Source 1 is a float; give a path, an address"),
        (True, ValueError, "Source 1 is a bool"),
        ([], ValueError, "There are no sources; give images"),
    ],
)
def test_what_is_no_source_is_said_before_anything_is_read(tree, source, error, message):
    if isinstance(source, str):
        source = source.format(tree=tree)
    with pytest.raises(error, match=message):
        find_sources(source if isinstance(source, list) else [source])


def read(*arguments, **settings) -> list:
    return list(read_sources(find_sources(*arguments), **settings))


def test_a_bad_image_is_reported_and_the_rest_goes_on(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "data")
    (tmp_path / "data" / "a" / "0.jpg").write_bytes(b"junk")
    whole = (tmp_path / "data" / "10.png").read_bytes()
    (tmp_path / "data" / "10.png").write_bytes(whole[: len(whole) // 2])
    Image.new("F", (4, 3)).save(tmp_path / "data" / "a" / "depth.tif")
    (tmp_path / "data" / "clip.mp4").write_bytes(b"junk" * 100)
    items = read([tmp_path / "data", tmp_path / "data" / "notes.txt"], every=4)
    failures = {item.source.name: item.reason for item in items if isinstance(item, Failure)}
    assert set(failures) == {"10.png", "a/0.jpg", "a/depth.tif", "clip.mp4", "notes.txt"}
    for name in ("a/0.jpg", "notes.txt"):
        assert failures[name].startswith("It is not an image of a known format (")
        assert failures[name].endswith("PPM, TGA, TIFF, WEBP), or its beginning is damaged.")
    assert "truncated" in failures["10.png"]
    assert "32 bits per pixel, mode 'F', of unknown range" in failures["a/depth.tif"]
    assert "Invalid data" in failures["clip.mp4"]
    pictures = [(item.source.name, item.frame) for item in items if isinstance(item, Picture)]
    clip = [("b/clip.mp4", 0), ("b/clip.mp4", 4), ("b/clip.mp4", 8)]
    assert pictures == [
        ("9.PNG", None),
        ("a/1.jpg", None),
        ("a/2.jpg", None),
        ("b/1.jpg", None),
        *clip,
        ("b/deep/1.webp", None),
    ]
    assert all(item.image.mode == "RGB" for item in items if isinstance(item, Picture))
    assert [item.source.name for item in items if isinstance(item, End)] == ["b/clip.mp4"]


def test_every_mode_becomes_rgb(tmp_path):
    image = Image.new("RGB", (5, 3), RED)
    for mode in ("RGBA", "P", "CMYK", "YCbCr", "HSV", "RGBX"):
        # conversions between colour spaces round, and a palette has steps of 51
        np.testing.assert_allclose(np.asarray(to_rgb(image.convert(mode)))[0, 0], RED, atol=26)
    for mode in ("L", "LA", "1"):
        assert to_rgb(Image.new("L", (5, 3), 255).convert(mode)).getpixel((1, 1)) == WHITE
    transparent = Image.new("RGBA", (5, 3), (*GREEN, 0))
    assert to_rgb(transparent).getpixel((0, 0)) == WHITE
    indexed = image.convert("P")
    indexed.info["transparency"] = bytes([0] * 256)
    assert to_rgb(indexed).size == (5, 3)
    assert to_rgb(image) is not image


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_from_their_full_range(tmp_path, suffix):
    values = np.array([[0, 257, 32896], [65535, 51400, 128]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    found = np.asarray(read_image(tmp_path / f"deep.{suffix}"))
    np.testing.assert_array_equal(found[..., 0], [[0, 1, 128], [255, 200, 0]])
    np.testing.assert_array_equal(found[..., 0], found[..., 2])
    assert to_rgb(Image.fromarray(values.astype(np.int32))).getpixel((0, 1)) == WHITE
    with pytest.raises(UnknownRange, match="32 bits per pixel, mode 'I', of unknown range; save it with 8 or 16 bits"):
        to_rgb(Image.fromarray(np.array([[70000, 1]], dtype=np.int32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    upright = Image.new("RGB", (40, 24), BLUE)
    upright.paste(RED, (0, 0, 20, 12))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "turned.png", exif=exif)
    found = read_image(tmp_path / "turned.png")
    assert found.size == (40, 24)
    assert [found.getpixel(place) for place in ((2, 2), (38, 2), (2, 22))] == [RED, BLUE, BLUE]
    with Image.open(tmp_path / "turned.png") as image:
        assert read_image(image).tobytes() == found.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own word for it
def test_damaged_exif_does_not_lose_the_image(tmp_path):
    noise(30, 20).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert read_image(tmp_path / "x.jpg").size == (30, 20)


def test_arrays_are_rgb_or_grey():
    assert read_image(np.full((4, 6, 3), RED, dtype=np.uint8)).getpixel((5, 3)) == RED
    assert read_image(np.full((4, 6), 7, dtype=np.uint8)).getpixel((5, 3)) == (7, 7, 7)
    assert read_image(np.zeros((8, 8, 3), dtype=np.uint8)[::2, ::2]).size == (4, 4)
    for array in (np.zeros((4, 6, 3)), np.zeros((3, 4, 6), dtype=np.uint8), np.zeros(4, dtype=np.uint8)):
        (item,) = read([array])
        assert "it must be uint8, (h, w, 3) RGB or (h, w)." in item.reason
    (item,) = read([np.zeros((0, 6, 3), dtype=np.uint8)])
    assert "so it has no content" in item.reason


def test_links_in_a_circle_and_names_of_other_encodings(tmp_path):
    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    noise(50, 30).save(root / "a" / "1.png")
    try:
        (root / "a" / "back").symlink_to("..")
        (root / "self.png").symlink_to("self.png")
        shutil.copy(root / "a" / "1.png", os.fsencode(root) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("the file system has no links, or names in UTF-8 alone")
    expected = ["a/1.png", "caf\N{REPLACEMENT CHARACTER}.png", "self.png"]
    assert names(root, exclude=tmp_path / "out") == expected
    assert names(str(root / "**" / "*.png"), exclude=tmp_path / "out") == expected
    items = read(find_sources(root))
    assert [type(item) for item in items] == [Picture, Picture, Failure]
    assert items[2].reason == "Too many levels of symbolic links."


def test_a_folder_that_cannot_be_listed_is_reported_and_the_rest_goes_on(tree, monkeypatch):
    scandir = os.scandir

    def refused(path):  # as for users without the permission, which the tests' user may have
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    items = read([tree / "b"], max_frames=1)
    assert [item.source.name for item in items if isinstance(item, Picture)] == ["1.jpg", "clip.mp4"]
    assert [item.source.name for item in items if isinstance(item, Failure)] == ["deep"]


# -- videos


def test_frames_have_numbers_and_times(tree):
    frames = list(read_frames(tree / "b" / "clip.mp4", every=3))
    assert [frame.index for frame in frames] == [0, 3, 6]
    np.testing.assert_allclose([frame.time for frame in frames], np.array([0, 3, 6]) * 1001 / 30000, atol=1e-4)
    # H.264 with colours halved, in the range of 16 to 235
    np.testing.assert_allclose([frame.image.getpixel((30, 20))[0] for frame in frames], [0, 48, 96], atol=3)
    assert len(list(read_frames(tree / "b" / "clip.mp4", max_frames=4))) == 4
    assert video_info(tree / "b" / "clip.mp4") == (Fraction(30000, 1001), 9)
    assert video_info(tree / "notes.txt") == video_info(0) == (25, None)


def test_odd_sides_lose_a_column_and_other_sizes_are_fitted(tmp_path):
    writer = VideoWriter(tmp_path / "odd.mp4", (65, 49), Fraction(10))
    image = Image.new("RGB", (65, 49), RED)
    image.paste(BLUE, (0, 0, 32, 49))
    for picture in (image, image, Image.new("RGB", (20, 20), GREEN)):
        writer.write(picture)
    writer.close()
    frames = list(read_frames(tmp_path / "odd.mp4"))
    assert [frame.image.size for frame in frames] == [(64, 48)] * 3
    assert np.abs(np.subtract(frames[0].image.getpixel((10, 10)), BLUE)).max() < 12
    assert np.abs(np.subtract(frames[0].image.getpixel((60, 40)), RED)).max() < 12
    assert np.abs(np.subtract(frames[2].image.getpixel((60, 40)), GREEN)).max() < 12


def test_a_video_of_a_phone_held_upright_is_turned(tmp_path):
    path = tmp_path / "upright.mp4"
    image = Image.new("RGB", (64, 48), RED)
    image.paste(BLUE, (0, 0, 32, 48))  # left, as the sensor sees it
    writer = VideoWriter(path, image.size, Fraction(10))
    for _ in range(3):
        writer.write(image)
    writer.close()
    data = bytearray(path.read_bytes())
    matrix = data.rindex(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2: a quarter turn to the right, in 16.16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    frame = next(iter(read_frames(path))).image
    assert frame.size == (48, 64)
    assert np.abs(np.subtract(frame.getpixel((24, 10)), BLUE)).max() < 12  # what was left is up
    assert np.abs(np.subtract(frame.getpixel((24, 54)), RED)).max() < 12


def test_a_video_that_breaks_off_gives_what_it_has(tree, tmp_path):
    write_video(tmp_path / "long.mp4", 15)
    data = bytearray((tmp_path / "long.mp4").read_bytes())
    start = data.index(b"mdat")
    data[start + 1500 :] = bytes(len(data) - start - 1500) if len(data) > start + 1500 else b""
    (tmp_path / "long.mp4").write_bytes(bytes(data))
    items = read([tmp_path / "long.mp4"])
    assert isinstance(items[-1], Failure)


def test_a_camera_that_is_not_there_is_a_failure(monkeypatch):
    monkeypatch.setattr("dino_hf.inference.videos.camera_input", lambda index: ("/dev/video-none", "none"))
    (item,) = read([0])
    assert isinstance(item, Failure)
    assert item.source.name == "camera-0"


def times(path) -> list[float]:
    return [frame.time for frame in read_frames(path)]


@pytest.mark.parametrize(
    ("given", "rate", "expected"),
    [
        ([0.1 * n for n in range(12)], 1000, [0.1 * n for n in range(12)]),  # of a browser: a clock without a rate
        ([0, 0.1, 0.2, 5.2, 5.3, 6], 10, [0, 0.1, 0.2, 5.2, 5.3, 6]),  # of a screen: nothing changed for 5 s
        ([None] * 5, Fraction(30000, 1001), [n * 1001 / 30000 for n in range(5)]),
        ([3, 3.5, 4], 10, [0, 0.5, 1]),
        ([0, 0.5, 0.5, 0.2, 1], 10, [0, 0.5, 0.5, 0.5, 1]),  # they stand still and go back
        ([0, 1e9, 1e9 + 1], 10, [0, 3600, 7200]),  # and leap
    ],
)
def test_a_written_video_has_the_times_of_its_frames(tmp_path, given, rate, expected):
    writer = VideoWriter(tmp_path / "x.mp4", (64, 48), rate)
    for number, moment in enumerate(given):
        writer.write(Image.new("RGB", (64, 48), (20 * number,) * 3), moment)
    writer.close()
    np.testing.assert_allclose(times(tmp_path / "x.mp4"), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "written"), [((4096, 20), (4096, 20)), ((4098, 40), (4096, 40)), ((30, 8192), (14, 4096))]
)
def test_large_pictures_are_written_smaller(tmp_path, size, written):
    writer = VideoWriter(tmp_path / "x.mp4", size, 10)
    writer.write(Image.new("RGB", size))
    writer.close()
    (frame,) = read_frames(tmp_path / "x.mp4")
    assert frame.image.size == written


def test_frames_that_are_too_large_are_refused_before_one_is_decoded(tree, monkeypatch):
    monkeypatch.setattr("dino_hf.inference.videos._MOST_PIXELS", 64 * 48)
    assert len(list(read_frames(tree / "b" / "clip.mp4"))) == 9
    monkeypatch.setattr("dino_hf.inference.videos._MOST_PIXELS", 64 * 48 - 1)
    (item,) = read([tree / "b" / "clip.mp4"])
    assert item.reason.startswith("Its frames are 64 x 48 pixels, and at most ")


def test_a_pipe_or_a_device_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "b.mkv").symlink_to("/dev/zero")
    (tmp_path / "c.webm").symlink_to("gone")
    items = read([tmp_path])
    assert [item.source.name for item in items] == ["a.mp4", "b.mkv", "c.webm"]
    assert [item.reason for item in items[:2]] == ["It is not a regular file."] * 2
    assert isinstance(items[2], Failure)


def test_a_playlist_under_the_name_of_a_video_leads_to_no_address(tmp_path):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
    (tmp_path / "a.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n")
    (item,) = read([tmp_path / "a.mp4"])
    assert isinstance(item, Failure)
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


# -- addresses


@pytest.fixture(scope="module")
def server(tree):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tree)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_read(server, tree):
    items = read([f"{server}/a/1.jpg", f"{server}/none.jpg", f"{server}/notes.txt", f"{server}/b/clip.mp4"], every=8)
    assert items[0].image.tobytes() == read_image(tree / "a" / "1.jpg").tobytes()
    assert video_info(f"{server}/none.mp4") == (25, None)
    assert items[1].reason == "HTTP Error 404: File not found."
    assert items[2].reason.startswith("It is not an image")
    assert [item.frame for item in items[3:-1]] == [0, 8]
    assert isinstance(items[-1], End)


def test_an_answer_that_is_an_error_or_a_refused_redirect_is_closed(server, tree, monkeypatch):
    closed = []
    close = http.client.HTTPResponse.close
    monkeypatch.setattr(http.client.HTTPResponse, "close", lambda self: closed.append(self.status) or close(self))
    assert isinstance(read([f"{server}/none.jpg"])[0], Failure)
    assert closed == [404]
    monkeypatch.setattr(downloads, "is_local", lambda host: host == "localhost")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", _redirect)
    assert "is not followed" in read([f"{server}/1.jpg"])[0].reason
    assert closed == [404, 302]


def _redirect(handler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "http://localhost:1/1.jpg")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def test_an_address_may_have_spaces_and_any_letters(server, tree):
    shutil.copy(tree / "a" / "1.jpg", tree / "empty" / "é 图.dat")  # not found by others that look for images
    items = read([f"{server}/empty/é 图.dat", f"{server}/empty/%C3%A9%20图.dat"])
    assert [type(item) for item in items] == [Picture, Picture]


def test_an_address_without_answer_and_too_large_a_file_are_failures(server, tree, monkeypatch):
    (item,) = read(["http://127.0.0.1:1/1.jpg"])
    assert "refused" in item.reason
    size = (tree / "a" / "1.jpg").stat().st_size
    monkeypatch.setattr(downloads, "LARGEST_DOWNLOAD", size)
    assert isinstance(read([f"{server}/a/1.jpg"])[0], Picture)
    monkeypatch.setattr(downloads, "LARGEST_DOWNLOAD", size - 1)
    (item,) = read([f"{server}/a/1.jpg"])
    assert item.reason == "It is larger than 0 MiB; download it yourself."


def test_an_address_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (item,) = read([f"http://127.0.0.1:{silent.getsockname()[1]}/1.jpg"])
    assert "timed out" in item.reason


HEADER = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("start", "again", "reason"),
    [
        (
            HEADER + b"Content-Length: 1000000\r\n\r\n",
            b"x",
            "was not fetched completely within",
        ),  # a body that trickles
        (HEADER, b"X: y\r\n", "It "),  # a header that never ends
        (HEADER + b"X: ", b"y", "was not fetched completely within"),
        (HEADER + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", "was not fetched completely within"),
    ],
)
def test_a_transfer_has_a_limit_of_time(monkeypatch, start, again, reason):
    monkeypatch.setattr(downloads, "_LONGEST", 0.6)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle():
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(start)
                for _ in range(30):
                    time.sleep(0.1)
                    connection.sendall(again)

        thread = threading.Thread(target=trickle)
        thread.start()
        begin = time.monotonic()
        (item,) = read([f"http://127.0.0.1:{listening.getsockname()[1]}/1.jpg"])
        assert time.monotonic() - begin < 2
        thread.join()
    assert reason in item.reason


@pytest.mark.parametrize(
    "answer", [b"junk\r\n\r\n", HEADER + b"Content-Length: 9\r\n\r\nxyz", HEADER + b"X: y\r\n" * 200]
)
def test_answers_that_are_no_http_or_break_off_are_failures(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply():
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        (item,) = read([f"http://127.0.0.1:{listening.getsockname()[1]}/1.jpg"])
        thread.join()
    assert isinstance(item, Failure)


def test_photos_that_are_not_read_are_named(tmp_path):
    for name in ("1.HEIC", "2.cr2", "3.jxl"):
        (tmp_path / name).write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(50))
    Image.new("RGB", (16, 12)).save(tmp_path / "4.dng", format="TIFF")  # the thumbnail in a raw image
    noise(40, 30).save(tmp_path / "5.heic", format="JPEG")  # as some phones name it
    for name in ("6.3gp", "7.ts"):
        (tmp_path / name).write_bytes(bytes(1000))
    items = read(tmp_path)
    assert [item.source.name[0] for item in items] == list("1234567")
    assert [type(item) for item in items] == [*[Failure] * 4, Picture, Failure, Failure]
    assert items[0].reason == "It is a HEIC image, which cannot be read; convert it to JPEG."
    assert items[3].reason == items[1].reason == "It is a raw image of a camera, which is not read; convert it to JPEG."


def test_in_several_folders_pages_or_frames_the_first_is_read_with_a_word(tmp_path):
    pages = [Image.new("RGB", (20, 12), colour) for colour in (RED, BLUE)]
    for name in ("scan.tif", "moving.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="only the first one is read") as told:
        items = read(tmp_path)
    assert [str(one.message) for one in told] == [
        "moving.gif has several frames; only the first one is read.",
        "scan.tif has several pages; only the first one is read.",
    ]
    assert all(np.abs(np.subtract(item.image.getpixel((3, 3)), RED)).max() < 12 for item in items)


def test_images_are_read_ahead_as_far_as_their_bytes_allow(tmp_path, monkeypatch):
    for number in range(6):
        Image.new("RGB", (100, 50)).save(tmp_path / f"{number}.png")
    found = find_sources(tmp_path)
    assert sources._decoded_bytes(found[0]) == 4 * 100 * 50
    monkeypatch.setattr(sources, "_AHEAD_BYTES", 2 * 4 * 100 * 50)
    started, read_one = [], sources.read_image
    monkeypatch.setattr(sources, "read_image", lambda origin: started.append(origin) or read_one(origin))
    stream = read_sources(found)
    next(stream)
    time.sleep(0.2)
    assert len(started) == 2
    assert len(list(stream)) == 5


@contextmanager
def answering(content: bytes):
    """The address of a server that sends these bytes to the first client."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply():
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.recv(10_000)
                connection.sendall(content)

        thread = threading.Thread(target=reply)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/1.jpg"
        thread.join()


@contextmanager
def redirecting(target: str) -> tuple[http.server.HTTPServer, str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}/a.png"
    finally:
        found.shutdown()
        found.server_close()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("file:///etc/passwd", "not allowed"),
        ("ftp://127.0.0.1/a.png", "which is not a web address"),
        ("http://127.0.0.1:9/a.png", "'127.0.0.1' in the local network, which is not followed"),
        ("http://[::1]:9/a.png", "'::1' in the local network"),
        ("http://169.254.169.254/latest", "'169.254.169.254' in the local network"),
    ],
)
def test_a_server_cannot_lead_to_files_or_into_the_local_network(target, reason, monkeypatch):
    real, seen = downloads.is_local, []
    # The first question is about the target, the second one about where we were: outside.
    monkeypatch.setattr(downloads, "is_local", lambda host: seen.append(host) or (len(seen) == 1 and real(host)))
    with redirecting(target) as address, pytest.raises((OSError, ValueError), match=reason):
        read_image(address)


def test_within_the_local_network_servers_may_lead_on(server):
    with redirecting(server + "/9.PNG") as address:
        assert read_image(address).size == (50, 30)


def test_compressed_answers_are_not_unpacked(monkeypatch):
    """A body of 100 KB could become gigabytes."""
    monkeypatch.setattr(downloads, "LARGEST_DOWNLOAD", 10_000)
    body = gzip.compress(bytes(10**7))
    assert len(body) < 10_000
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with answering(head + body) as address:
        assert downloads.download(address) == body


def test_a_body_in_pieces_without_an_end_is_too_large(monkeypatch):
    monkeypatch.setattr(downloads, "LARGEST_DOWNLOAD", 10**5)
    piece = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    body = HEADER + b"Transfer-Encoding: chunked\r\n\r\n" + 50 * piece
    with answering(body) as address, pytest.raises(ValueError, match="larger than"):
        downloads.download(address)


def test_pictures_without_their_suffix_are_told(tmp_path):
    for name in ("1.png", "scan", "photo.jpeg.bak", "notes.txt"):
        noise(40, 30).save(tmp_path / name, "PNG" if name != "notes.txt" else "PPM")
    (tmp_path / "report").write_bytes(b"%PDF-1.7")
    os.mkfifo(tmp_path / "pipe")
    with pytest.warns(UserWarning, match=r"3 files .* 'photo.jpeg.bak'"):
        assert names(tmp_path) == ["1.png"]
    assert names([tmp_path / "scan"]) == ["scan"]


def test_frames_that_become_too_large_are_refused(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(videos, "_check_size", lambda stream: None)  # a header may say anything
    monkeypatch.setattr(videos, "_MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match="Its frames are 64 x 48 pixels"):
        list(read_frames(tmp_path / "a.mp4"))


@pytest.mark.parametrize("free", [16 * 50 * 30, 16 * 50 * 30 - 1])
def test_an_image_for_which_memory_is_lacking_is_named_and_skipped(tree, monkeypatch, free):
    monkeypatch.setattr(image_origins, "_LARGE", 50 * 30 - 1)
    monkeypatch.setattr(image_origins, "free_main_memory", lambda: free)
    (item,) = read(tree / "10.png")
    if free == 16 * 50 * 30:
        assert isinstance(item, Picture)
    else:
        assert item.reason.startswith(
            "It has 50 x 30 pixels, which need about 23 KiB of memory, and 23 KiB are free; scale"
        )
    monkeypatch.setattr(image_origins, "_LARGE", 50 * 30)
    assert isinstance(read(tree / "10.png")[0], Picture)  # too small to ask
