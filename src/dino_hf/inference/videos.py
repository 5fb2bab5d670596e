"""Videos and cameras in, annotated videos out, by PyAV (FFmpeg)."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.error
from PIL import Image

_TIMEOUT = 20.0  # seconds without an answer of an address


class Frame(NamedTuple):
    image: Image.Image  # RGB, upright
    index: int  # in the video, from 0
    time: float | None  # seconds since the beginning; None: the video does not tell


class VideoInfo(NamedTuple):
    frame_rate: Fraction  # frames per second
    num_frames: int | None  # None: nobody knows, as of a camera


def read_frames(origin: Path | str | int, *, every: int = 1, max_frames: int | None = None) -> Iterator[Frame]:
    """Each `every`-th frame, at most `max_frames`, of a file, an address or the camera of an index.

    Raises:
        ValueError, OSError: there is no video in it, no such camera, or it is damaged; frames before the damage came.
    """
    num_read, frame = 0, None
    with _open(origin) as container:
        stream = _video_of(container)
        stream.thread_type = "AUTO"
        start = (stream.start_time or 0) * stream.time_base
        for index, frame in enumerate(container.decode(stream)):
            if index % every:
                continue
            image = frame.to_image()
            if frame.rotation:  # of a phone that was held upright
                image = image.rotate(frame.rotation, expand=True)
            yield Frame(image, index, None if frame.time is None else float(frame.time - start))
            num_read += 1
            if num_read == max_frames:
                break
    if frame is None:
        raise ValueError("It has no frames.")


def video_info(origin: Path | str | int) -> VideoInfo:
    """What a file says, which may be wrong; 25 frames per second, if it says nothing, or cannot be read, and of a camera."""
    rate, num_frames = None, None
    if not isinstance(origin, int):  # a camera is opened once
        with suppress(OSError, ValueError, av.error.FFmpegError), _open(origin) as container:
            stream = _video_of(container)
            rate, num_frames = stream.average_rate or stream.guessed_rate, stream.frames or None
            if num_frames is None and rate and stream.duration:
                num_frames = round(stream.duration * stream.time_base * rate)
    return VideoInfo(Fraction(rate or 25), num_frames)


def _open(origin: Path | str | int):
    if isinstance(origin, int):
        file, file_format = camera_input(origin)
        # Apple's cameras refuse FFmpeg's own choice, 29.97.
        options = {"framerate": "30"} if file_format == "avfoundation" else {}
        return av.open(file, format=file_format, container_options=options)
    return av.open(str(origin), timeout=_TIMEOUT if isinstance(origin, str) else None)


def _video_of(container):
    if not container.streams.video:
        raise ValueError("It has no video.")
    return container.streams.video[0]


def camera_input(index: int, platform: str = sys.platform) -> tuple[str, str]:
    """What FFmpeg opens for a camera, and its format.

    Raises:
        ValueError: on Windows, where cameras have names, there are not so many.
    """
    if platform == "darwin":
        return str(index), "avfoundation"
    if platform != "win32":
        return f"/dev/video{index}", "v4l2"
    cameras = [device.name for device in av.enumerate_input_devices("dshow") if "video" in device.media_types]
    if index >= len(cameras):
        raise ValueError(f"There is no camera {index}; there are {len(cameras)}: {cameras}.")
    return f"video={cameras[index]}", "dshow"


class VideoWriter:
    """An MP4 of pictures, in H.264, or in MPEG-4 where FFmpeg was built without it. It can be played up to where the process was
    killed.

    Args:
        size: (width, height) of the pictures; an odd side loses its last row or column, which the codecs cannot hold.
    """

    def __init__(self, path: Path, size: tuple[int, int], frame_rate: Fraction):
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self.size = tuple(max(2, side - side % 2) for side in size)
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "hybrid_fragmented"})
        # MPEG-4's clock ticks at most 65535 times a second: 30000/1001 fits, 1000000/33367 does not.
        self._stream = self._container.add_stream(codec, rate=Fraction(frame_rate).limit_denominator(1001))
        self._stream.width, self._stream.height = self.size
        self._stream.pix_fmt = "yuv420p"
        if codec == "mpeg4":
            self._stream.bit_rate = 8 * self.size[0] * self.size[1]
        else:
            self._stream.options = {"crf": "20", "preset": "veryfast"}

    def write(self, image: Image.Image) -> None:
        width, height = self.size
        if image.size != self.size:
            is_odd = image.width - width in (0, 1) and image.height - height in (0, 1)
            # Videos may change their size.
            image = image.crop((0, 0, width, height)) if is_odd else image.resize(self.size)
        self._container.mux(self._stream.encode(av.VideoFrame.from_image(image)))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()
