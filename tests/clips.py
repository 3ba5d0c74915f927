"""Videos encoded by PyAV whose frames are known."""

import av
import numpy as np


def encode(path, frames, rate=10, codec="libx264", **options):
    """Write frames (h w 3, RGB) to a video file; the container is told by the suffix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def checkerboard(shift, size=(96, 128), side=8):
    """A board of gray squares moved by some pixels."""
    y, x = np.indices(size)
    board = ((x + shift) // side + y // side) % 2
    return np.repeat((60 + 130 * board).astype(np.uint8)[..., None], 3, axis=-1)


def blurred(frame, width=9):
    """Motion blur along the rows."""
    summed = sum(np.roll(frame.astype(np.float64), k - width // 2, axis=1) for k in range(width))
    return (summed / width).astype(np.uint8)
