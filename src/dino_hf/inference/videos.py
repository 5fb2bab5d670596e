"""Read frames of videos and cameras, and write videos, with PyAV (FFmpeg)."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..common.installation import with_install_command
from ..common.regular_files import is_regular

_TIMEOUT = 20.0  # seconds without an answer from an address
_MOST_PIXELS = 2**27  # pixels of a frame; the largest cameras have half as many
_DECODER_BYTES = 2**29  # memory for frames in the threads of the decoder
_LONGEST_SIDE = 4096  # pixels of a written video; graphics cards and most players support this size
_TICKS = 60_000  # time units per second of a written video; a multiple of 24, 25, 30, 50, 60 and 30000/1001 frames per second
_LONGEST_PAUSE = 3600 * _TICKS  # longest time between two frames; an MP4 cannot store a pause of a day


class Frame(NamedTuple):
    image: Image.Image  # RGB, upright
    index: int  # number in the video, from 0
    time: float | None  # seconds since the beginning; None: unknown


class VideoInfo(NamedTuple):
    frame_rate: Fraction  # frames per second
    num_frames: int | None  # None: unknown, for example for a camera


def read_frames(origin: Path | str | int, *, every: int = 1, max_frames: int | None = None) -> Iterator[Frame]:
    """Yield frames of a video file, an address, or a camera, given by its index.

    Args:
        every: yield every N-th frame.
        max_frames: yield at most this many frames. None: all.
    Raises:
        ValueError, OSError: there is no video or no such camera, or the video is damaged. Frames before the damage are yielded.
    """
    num_read, frame = 0, None
    with _open(origin) as container:
        stream = _video_of(container)
        _check_size(stream)
        stream.thread_type = "AUTO"
        start = (stream.start_time or 0) * stream.time_base
        for index, frame in enumerate(container.decode(stream)):
            if index % every:
                continue
            _check_pixels(frame.width, frame.height)  # the size of frames may change within a video
            image = frame.to_image()
            if frame.rotation:  # the phone was held upright
                image = image.rotate(frame.rotation, expand=True)
            yield Frame(image, index, None if frame.time is None else float(frame.time - start))
            num_read += 1
            if num_read == max_frames:
                break
    if frame is None:
        raise ValueError("It has no frames.")


def video_info(origin: Path | str | int) -> VideoInfo:
    """Frame rate and number of frames, as the file states them. They may be wrong.

    Without PyAV, for a camera, and for a file that does not state it, the frame rate is 25.
    """
    rate, num_frames = None, None
    if not isinstance(origin, int) and _has_av():  # a camera is opened once
        with suppress(OSError, ValueError, _av().FFmpegError), _open(origin) as container:
            stream = _video_of(container)
            rate, num_frames = stream.average_rate or stream.guessed_rate, stream.frames or None
            if num_frames is None and rate and stream.duration:
                num_frames = round(stream.duration * stream.time_base * rate)
    return VideoInfo(Fraction(rate or 25), num_frames)


def _check_size(stream) -> None:
    """Refuse frames that are too large. Use fewer threads for large frames, because each thread holds some frames."""
    codec = stream.codec_context
    num_pixels = (codec.width or 0) * (codec.height or 0)
    _check_pixels(codec.width or 0, codec.height or 0)
    fit = max(1, _DECODER_BYTES // max(1, 2 * num_pixels))
    codec.thread_count = min(fit, os.cpu_count() or 1)


def _av():
    """Import PyAV. It is optional: only videos and cameras need it.

    Raises:
        ImportError: PyAV is not installed. The message has the command that installs it.
    """
    try:
        import av
    except ImportError as error:
        raise with_install_command(error, "av", "videos and cameras", "video") from error
    return av


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ValueError(
            f"Its frames are {width} x {height} pixels, and at most {_MOST_PIXELS // 10**6} million are read; scale it down."
        )


def _has_av() -> bool:
    try:
        _av()
    except ImportError:
        return False
    return True


def _open(origin: Path | str | int):
    if isinstance(origin, int):
        file, file_format = camera_input(origin)
        # Apple's cameras refuse FFmpeg's own choice, 29.97.
        options = {"framerate": "30"} if file_format == "avfoundation" else {}
        return _av().open(file, format=file_format, container_options=options)
    if isinstance(origin, Path):
        origin.stat()  # if the file does not exist, this raises the system's error
        if not is_regular(origin):
            raise ValueError("It is not a regular file.")
        # A playlist with the suffix of a video must not open addresses.
        return _av().open(str(origin), options={"protocol_whitelist": "file"})
    return _av().open(str(origin), timeout=_TIMEOUT if isinstance(origin, str) else None)


def _video_of(container):
    if not container.streams.video:
        raise ValueError("It has no video.")
    return container.streams.video[0]


def camera_input(index: int, platform: str = sys.platform) -> tuple[str, str]:
    """Name and format with which FFmpeg opens a camera.

    Raises:
        ValueError: the index is too high. This is known only on Windows, where cameras are listed by name.
    """
    if platform == "darwin":
        return str(index), "avfoundation"
    if platform != "win32":
        return f"/dev/video{index}", "v4l2"
    cameras = [device.name for device in _av().enumerate_input_devices("dshow") if "video" in device.media_types]
    if index >= len(cameras):
        raise ValueError(f"There is no camera {index}; there are {len(cameras)}: {cameras}.")
    return f"video={cameras[index]}", "dshow"


class VideoWriter:
    """Writes pictures as an MP4, in H.264, or in MPEG-4 if FFmpeg lacks H.264. If the process is killed, the file stays playable.

    Args:
        size: (width, height) of the pictures. The codecs need even sides, so the last row or column of an odd side is cut off.
            Pictures with a side of more than 4,096 pixels are scaled down.
        frame_rate: frames per second, for pictures without a time.
    """

    def __init__(self, path: Path, size: tuple[int, int], frame_rate: Fraction):
        av = _av()
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        scale = min(1, _LONGEST_SIDE / max(size))
        self.size = tuple(max(2, side - side % 2) for side in (round(scale * side) for side in size))
        self._step = max(1, min(_LONGEST_PAUSE, round(_TICKS / max(frame_rate, Fraction(1, 3600)))))
        self._start: float | None = None
        self._ticks = -self._step
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "hybrid_fragmented"})
        rate = min(max(Fraction(frame_rate), Fraction(1)), Fraction(1000)).limit_denominator(1001)
        self._stream = self._container.add_stream(codec, rate=rate)
        self._stream.width, self._stream.height = self.size
        self._stream.pix_fmt = "yuv420p"
        # Frame times can be irregular: screen recorders, browsers and phones write a frame when the picture changes.
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        if codec == "mpeg4":
            self._stream.bit_rate = 8 * self.size[0] * self.size[1]
        else:
            self._stream.options = {"crf": "20", "preset": "veryfast"}

    def write(self, image: Image.Image, time: float | None = None) -> None:
        """Append a picture.

        Args:
            time: seconds since the beginning, later than the picture before. None: one frame after the picture before.
        """
        width, height = self.size
        if image.size != self.size:
            is_odd = image.width - width in (0, 1) and image.height - height in (0, 1)
            # The size of frames may change within a video.
            image = image.crop((0, 0, width, height)) if is_odd else image.resize(self.size)
        frame = _av().VideoFrame.from_image(image)
        self._ticks = frame.pts = self._next_tick(time)
        frame.time_base = Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))

    def _next_tick(self, time: float | None) -> int:
        if time is None:
            return self._ticks + self._step
        if self._start is None:
            self._start = time - max(0, self._ticks + self._step) / _TICKS
        ticks = round((time - self._start) * _TICKS)
        # In damaged videos, time stamps repeat, go back or jump ahead.
        lowest = max(0, self._ticks + 1)
        return min(max(ticks, lowest), lowest + _LONGEST_PAUSE)

    def close(self) -> None:
        """Write the last frames and close the file."""
        self._container.mux(self._stream.encode())
        self._container.close()
