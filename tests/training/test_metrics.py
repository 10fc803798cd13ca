"""metrics.jsonl has neither gaps nor duplicates after any crash, and the speed is that of training alone."""

import contextlib
import json
import shutil
import time

import numpy as np
import pytest
from clu import metric_writers
from PIL import Image

from mae_jax.files import write_json
from mae_jax.training import metrics


def written(workdir, steps, resume_step=0, **more):
    writer = metrics.Writer(workdir, resume_step)
    for step in steps:
        writer.scalars(step, {"train/loss": 1 / (step + 1), **more})
    writer.close()


def steps_in(workdir):
    return [line["step"] for line in metrics.read(workdir / "metrics.jsonl")]


def test_each_line_is_one_json_object_with_its_step_first(tmp_path):
    written(tmp_path, [0, 1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": i, "train/loss": 1 / (i + 1)} for i in range(3)]
    assert all(line.startswith('{"step": ') for line in lines)


def test_numbers_survive_to_the_last_bit(tmp_path):
    loss = np.float32(0.1) / np.float32(3)
    written(tmp_path, [1], loss=loss, big=np.float32(1e38), small=np.float32(1e-45))
    (line,) = metrics.read(tmp_path / "metrics.jsonl")
    assert np.float32(line["loss"]) == loss
    assert np.float32(line["big"]) == np.float32(1e38)
    assert np.float32(line["small"]) == np.float32(1e-45) > 0


def test_what_is_no_number_is_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n')
    written(tmp_path, [2], resume_step=1, norm=np.float32(np.inf))
    write_json(tmp_path / "summary.json", {"metrics": {"a": [float("-inf"), 1.0]}})
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [line.get("norm", line["train/loss"]) for line in metrics.read(tmp_path / "metrics.jsonl")] == [None, None]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"metrics": {"a": [None, 1.0]}}


def test_lines_are_on_disk_before_the_writer_is_closed(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.scalars(1, {"train/loss": 0.5})
    assert steps_in(tmp_path) == [1]
    writer.close()


def test_a_resumed_run_drops_later_lines_and_goes_on_without_duplicates(tmp_path):
    written(tmp_path, [0, 2, 4, 4, 6, 8])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written(tmp_path, [5, 6, 7], resume_step=4)
    assert steps_in(tmp_path) == [0, 2, 4, 4, 5, 6, 7]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:4] == before[:4], "kept lines are kept as they were"


def test_a_run_that_starts_anew_starts_an_empty_file(tmp_path):
    written(tmp_path, [0, 1, 2])
    written(tmp_path, [0, 1])
    assert steps_in(tmp_path) == [0, 1]


@pytest.mark.parametrize("keep", [-1, -2, -10, -25], ids=lambda n: f"cut {-n}")
def test_a_last_line_cut_by_a_crash_is_dropped_and_nothing_is_glued_to_it(keep, tmp_path):
    written(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:keep])
    whole = [1, 2, 3] if keep == -1 else [1, 2]  # without its newline alone, the line is complete
    assert steps_in(tmp_path) == whole
    written(tmp_path, [4], resume_step=3)
    assert steps_in(tmp_path) == [*whole, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe\x00\x81", b"5", b"[]", b"{}", b'{"step": "x"}', b'{"step": true}', b"[" * 200_000],
    ids=range(7),
)
def test_a_damaged_line_is_told_and_kept_aside(damage, tmp_path, capsys):
    written(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    for again in ("", ".1"):
        path.write_bytes(path.read_bytes() + damage + b"\n")
        before = path.read_bytes()
        written(tmp_path, [3], resume_step=2)
        assert steps_in(tmp_path) == [1, 2, 3]
        assert (tmp_path / f"metrics.jsonl.damaged{again}").read_bytes() == before
        (line,) = capsys.readouterr().out.splitlines()
        assert "damaged in line" in line and f"kept as {path}.damaged{again}, and gone on without" in line


def test_metrics_that_cannot_be_read_are_kept_aside(tmp_path, capsys):
    (tmp_path / "metrics.jsonl" / "below").mkdir(parents=True)
    written(tmp_path, [3], resume_step=2)
    assert steps_in(tmp_path) == [3] and (tmp_path / "metrics.jsonl.damaged" / "below").is_dir()
    assert "metrics.jsonl: not readable (Is a directory)" in capsys.readouterr().out


def test_no_file_reads_as_no_lines(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_a_picture_is_a_png_of_exactly_those_pixels(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    writer = metrics.Writer(tmp_path)
    path = writer.picture(12, "reconstructions", image)
    writer.close()
    assert path == tmp_path / "reconstructions" / "step_12.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


def test_tensorboard_holds_the_same_scalars_and_the_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    writer = metrics.Writer(tmp_path)
    writer.scalars(3, {"train/loss": 0.25})
    writer.scalars(6, {"train/loss": 0.125, "eval/loss": 2.0})
    writer.picture(6, "reconstructions", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {"train/loss", "eval/loss", "reconstructions"} <= set(tags)
    losses = [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors("train/loss")]
    assert losses == [(3, 0.25), (6, 0.125)]


def test_lines_that_a_full_disk_has_no_room_for_are_written_when_it_has(small_disk, capsys):
    disk = small_disk(1_000_000)
    writer = metrics.Writer(disk)
    (disk / "filling").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
    for step in range(1, 201):
        writer.scalars(step, {"train/loss": 1 / step})
    assert 0 < len(metrics.read(writer.path)) < 200
    writer.picture(200, "reconstructions", np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))
    (disk / "filling").unlink()
    writer.scalars(201, {"train/loss": 1.0})
    writer.close()
    assert steps_in(disk) == list(range(1, 202))
    told = capsys.readouterr().out.splitlines()
    assert len([line for line in told if "metrics.jsonl: not written for now (No space left on device)" in line]) == 1
    assert len([line for line in told if "step_200.png: not written (No space left on device)" in line]) == 1


def test_metrics_go_on_where_tensorboard_has_lost_its_folder(tmp_path, capsys):
    writer = metrics.Writer(tmp_path)
    writer.scalars(1, {"train/loss": 0.5})
    writer._tensorboard.flush()
    shutil.rmtree(tmp_path / "tensorboard")
    for step in (2, 3):
        writer.scalars(step, {"train/loss": 0.5})
    writer.close()
    assert steps_in(tmp_path) == [1, 2, 3]
    assert len([line for line in capsys.readouterr().out.splitlines() if "not written any more" in line]) <= 1


@pytest.mark.parametrize("first", ["write_scalars", "write_images", "close"])
def test_metrics_go_on_without_tensorboard_from_its_first_error_on(first, tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, path):
            pass

        def __getattr__(self, name):
            def call(*args, **options):
                if name == first:
                    raise OSError(28, "No space left on device")

            return call

    monkeypatch.setattr(metric_writers, "SummaryWriter", Broken)
    writer = metrics.Writer(tmp_path)
    for step in range(1, 6):
        writer.scalars(step, {"train/loss": 0.5})
        writer.picture(step, "pictures", np.zeros((4, 4, 3), np.uint8))
        if writer._tensorboard:
            time.sleep(0.05)  # for it to fail, in the background
    writer.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "pictures").iterdir())) == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'tensorboard'}: not written any more (") and "No space left" in line


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


class Lines:
    """A writer that keeps its lines."""

    def __init__(self):
        self.lines = []

    def scalars(self, step, scalars):
        self.lines.append((step, dict(scalars)))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def spend(clock, seconds, context=contextlib.nullcontext):
    with context():
        clock.now += seconds


def test_speed_counts_training_and_waiting_but_not_compiling_evaluating_and_saving(clock, capsys):
    lines = Lines()
    progress = metrics.Progress(lines, steps=40, batch_size=32)
    spend(clock, 7.0, progress.paused)  # evaluation of the fresh model
    spend(clock, 3.0, progress.waiting)  # the first batch
    spend(clock, 90.0)  # compilation
    progress.start(1)
    spend(clock, 1.0, progress.waiting)
    spend(clock, 3.0)
    progress.log(11, {"loss": 2.0, "grad_norm": 5.0})
    spend(clock, 50.0, progress.paused)
    spend(clock, 0.5, progress.waiting)
    spend(clock, 1.5)
    progress.log(21, {"loss": 1.0, "grad_norm": 4.0})
    assert lines.lines == [
        (11, {"train/loss": 2.0, "train/grad_norm": 5.0, **speed(10 * 32 / 4.0, 0.25)}),
        (21, {"train/loss": 1.0, "train/grad_norm": 4.0, **speed(10 * 32 / 2.0, 0.25)}),
    ]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "first step after 100.0 s"
    assert " ".join(shown[1].split()) == "step 11/40 28% loss 2.0000 80 images/s 0:00:11 left"
    assert " ".join(shown[2].split()) == "step 21/40 52% loss 1.0000 160 images/s 0:00:03 left"


def speed(images_per_second, waiting):
    return {
        "train/images_per_second": pytest.approx(images_per_second, rel=1e-9),
        "perf/data_wait_fraction": pytest.approx(waiting, rel=1e-9),
    }


def test_of_several_hosts_the_one_that_waits_longest_for_data_is_named(clock, monkeypatch):
    lines = Lines()
    progress = metrics.Progress(lines, steps=20, batch_size=32)
    progress.start(1)
    spend(clock, 1.0, progress.waiting)
    spend(clock, 3.0)
    monkeypatch.setattr(metrics.hosts, "gather", lambda own: [own, "0.75", "0.5"])
    progress.log(11, {"loss": 2.0})
    ((_, numbers),) = lines.lines
    found = {name: value for name, value in numbers.items() if name.startswith("perf/")}
    assert found == {
        "perf/data_wait_fraction": 0.25,
        "perf/slowest_host": 1,
        "perf/slowest_host_data_wait_fraction": 0.75,
    }


def test_the_first_step_has_no_speed(clock):
    lines = Lines()
    progress = metrics.Progress(lines, steps=3, batch_size=8)
    spend(clock, 60.0)
    progress.start(1)
    progress.log(1, {"loss": 1.0})
    spend(clock, 2.0)
    progress.log(2, {"loss": 0.5})
    assert lines.lines == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5, **speed(4.0, 0.0)})]


def test_time_left_counts_hours(clock, capsys):
    progress = metrics.Progress(Lines(), steps=10_001, batch_size=1)
    progress.start(1)
    spend(clock, 1.0)
    progress.log(2, {"loss": 1.0})
    assert "2:46:39 left" in capsys.readouterr().out
