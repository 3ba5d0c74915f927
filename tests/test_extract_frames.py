"""Frames of videos that PyAV encoded: which are taken, how they are turned, and what is said of bad files."""

import json
import struct

import av
import numpy as np
import pytest
from clips import blurred, checkerboard, encode
from PIL import Image

from dust3r_sfm.errors import InputError
from dust3r_sfm.extract_frames import FrameConfig, extract_frames
from dust3r_sfm.formats import video


def times_of(folder):
    return list(json.loads((folder / ".frames.json").read_text())["times_s"].values())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Three seconds of a moving board at ten frames a second; few are not blurred, some of them at a slot's border."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = [checkerboard(i) for i in range(30)]
    sharp = {3, 7, 13, 17, 23, 27} | {0, 10, 19}
    return encode(path, [frame if i in sharp else blurred(frame) for i, frame in enumerate(frames)])


def test_of_each_slot_the_sharp_frame_in_its_middle_is_taken(clip, tmp_path):
    names = extract_frames(clip, tmp_path / "frames", FrameConfig(fps=2.0))
    assert names == [f"frame_{i:05d}.jpg" for i in range(6)]
    assert sorted(path.name for path in (tmp_path / "frames").glob("*.jpg")) == names
    assert times_of(tmp_path / "frames") == [0.3, 0.7, 1.3, 1.7, 2.3, 2.7]
    expected = checkerboard(7).astype(float)
    assert np.abs(np.asarray(Image.open(tmp_path / "frames" / names[1])) - expected).mean() < 6


def test_every_frame_is_taken_where_the_video_has_no_more(clip, tmp_path):
    assert len(extract_frames(clip, tmp_path / "frames", FrameConfig(fps=10.0))) == 30


def test_long_clips_are_sampled_more_sparsely(clip, tmp_path):
    assert len(extract_frames(clip, tmp_path / "frames", FrameConfig(fps=10.0, max_frames=4))) == 4
    assert np.diff(times_of(tmp_path / "frames")).min() > 0.3


def test_a_second_call_takes_what_is_there_and_another_config_replaces_it(clip, tmp_path):
    names = extract_frames(clip, tmp_path / "frames", FrameConfig(fps=2.0))
    (tmp_path / "frames" / names[0]).write_bytes(b"kept")
    assert extract_frames(clip, tmp_path / "frames", FrameConfig(fps=2.0)) == names
    assert (tmp_path / "frames" / names[0]).read_bytes() == b"kept"
    assert len(extract_frames(clip, tmp_path / "frames", FrameConfig(fps=1.0))) == 3
    assert len(list((tmp_path / "frames").glob("*.jpg"))) == 3


def test_a_camera_that_stands_still_gives_one_frame(tmp_path):
    frames = [checkerboard(0)] * 20 + [checkerboard(i) for i in range(10)]
    path = encode(tmp_path / "still.mp4", frames)
    extract_frames(path, tmp_path / "frames", FrameConfig(fps=2.0))
    assert len(times_of(tmp_path / "frames")) == 3
    with pytest.raises(InputError, match="gives 1 differing frame at 2 fps: at least two"):
        extract_frames(encode(tmp_path / "stiller.mp4", frames[:20]), tmp_path / "none", FrameConfig(fps=2.0))
    assert not (tmp_path / "none").exists()


def halves(first, second):
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48], image[:, 48:] = first, second
    return image


@pytest.mark.parametrize(
    ("matrix", "upright_size", "red_at"),
    # ISO 14496-12, 8.3.2: x' = a x + c y, y' = b x + d y; what a phone writes that is held upright, upside down, ...
    [((1, 0, 0, 1), (96, 64), "left"), ((0, 1, -1, 0), (64, 96), "top"), ((-1, 0, 0, -1), (96, 64), "right")],
)
def test_frames_are_turned_as_the_file_says(tmp_path, matrix, upright_size, red_at):
    frames = [halves((255, 0, 0), (0, 0, 16 * i)) for i in range(10)]
    path = encode(tmp_path / "turned.mp4", frames)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, id, duration, layer, volume: then nine numbers
    assert struct.unpack(">9i", data[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    names = extract_frames(path, tmp_path / "frames", FrameConfig(fps=5.0))
    with Image.open(tmp_path / "frames" / names[0]) as image:
        assert image.size == upright_size
        width, height = image.size
        spots = {"left": (4, height // 2), "top": (width // 2, 4), "right": (width - 4, height // 2)}
        red, green, blue = image.getpixel(spots[red_at])
    assert red > 200
    assert max(green, blue) < 60


def test_frames_without_times_are_counted(tmp_path):
    path = encode(tmp_path / "raw.h264", [checkerboard(i) for i in range(50)], rate=25)
    timeline = video.read_timeline(path)
    assert not timeline.has_times
    assert timeline.duration_s == pytest.approx(2.0)
    assert len(extract_frames(path, tmp_path / "frames", FrameConfig(fps=2.0))) == 4


def test_the_frames_before_a_damage_are_used(tmp_path, caplog):
    path = encode(tmp_path / "cut.mkv", [checkerboard(i) for i in range(30)], g="5")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    names = extract_frames(path, tmp_path / "frames", FrameConfig(fps=2.0))
    assert 2 <= len(names) < 6


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def playlist(path):
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n")


BAD_FILES = {
    "missing": (lambda path: None, "is no video file"),
    "a folder": (lambda path: path.mkdir(), "is no video file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a video"),
    "text": (lambda path: path.write_text("no video" * 99), "cannot be read as a video"),
    "without its index": (
        lambda path: path.write_bytes(encode(path, [checkerboard(i) for i in range(9)]).read_bytes()[:900]),
        "cannot be read as a video",
    ),
    "a playlist": (playlist, "cannot be read as a video"),
    "sound": (sound, "has no pictures"),
    "one frame": (lambda path: encode(path, [checkerboard(0)]), r"lasts 0.10 s and gives 1 differing frame"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_video_is_one_sentence_and_leaves_nothing(tmp_path, kind):
    write, sentence = BAD_FILES[kind]
    path = tmp_path / "clip.mp4"
    write(path)
    with pytest.raises(InputError, match=sentence):
        extract_frames(path, tmp_path / "frames")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("frames")]


def test_bad_options_and_a_foreign_folder_are_refused(clip, tmp_path):
    for config in (FrameConfig(fps=0.0), FrameConfig(max_frames=1)):
        with pytest.raises(InputError, match="expected fps above 0 and max_frames of 2 or more"):
            extract_frames(clip, tmp_path / "frames", config)
    (tmp_path / "mine.jpg").write_bytes(b"photo")
    with pytest.raises(InputError, match="holds other files"):
        extract_frames(clip, tmp_path)
