"""python -m pytest tests/test_launch.py      (needs colossalai; skipped where it is not installed)

Proves that a config section turns the cache on, whichever file it stands in, and that a wrong one is refused by name;
that `colossalai run` and torchrun train the example on several processes, in each sharding and over two nodes, with
the result of one process; and that what is wrong ends the launch with a message, not with a hang.
`FREQCACHE_LAUNCHES=20 python -m pytest tests/test_launch.py -k in_a_row` launches that often.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("colossalai", reason="colossalai is not installed here")

from colossalai.context import Config

from colossal_freqcache import FreqCacheConfig
from colossal_freqcache.integration import build_plugin, launch_from_torch, load_config, read_config_file

pytestmark = pytest.mark.colossalai

EXAMPLE = Path(__file__).parents[1] / "examples" / "dlrm" / "train.py"
SECTION = dict(cache_ratio=0.25, evict_strategy="lru", sharding="row", optimizer="adagrad")
PYTHON = "freq_cache = dict(cache_ratio=0.25, evict_strategy='lru', sharding='row', optimizer='adagrad')"
TOML = "[freq_cache]\ncache_ratio = 0.25\nevict_strategy = 'lru'\nsharding = 'row'\noptimizer = 'adagrad'\n"
YAML = "freq_cache: {cache_ratio: 0.25, evict_strategy: lru, sharding: row, optimizer: adagrad}"
FILES = {
    "config.py": f"BATCH_SIZE = 3\n{PYTHON}\n",
    "config.json": json.dumps({"BATCH_SIZE": 3, "freq_cache": SECTION}),
    "config.yaml": f"BATCH_SIZE: 3\n{YAML}\n",
    "config.toml": f"BATCH_SIZE = 3\n{TOML}",
}


# ---- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_config(name, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name])
    assert load_config(path) == load_config(str(path)) == FreqCacheConfig(**SECTION)
    assert read_config_file(path).BATCH_SIZE == 3


def test_a_dict_a_config_and_a_ready_one_are_taken():
    expected = FreqCacheConfig(**SECTION)
    assert load_config({"freq_cache": SECTION}) == load_config(Config({"freq_cache": SECTION})) == expected
    assert load_config(expected) is expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.py", "frequency_cache = dict()", r"c\.py has no section 'freq_cache' \(.*'frequency_cache'"),
        ("c.py", "BATCH_SIZE = 3", r"no section 'freq_cache' \(it has BATCH_SIZE\): add freq_cache = dict"),
        (
            "c.py",
            "freq_cache = dict(cache_ration=0.1)",
            r"unknown 'cache_ration' \(did you mean 'cache_ratio'\?\); known",
        ),
        ("c.py", "freq_cache = dict(cache_ratio=2)", r"cache_ratio=2 is not allowed: a share of the rows in \(0, 1\]"),
        ("c.py", "freq_cache = 0.1", "freq_cache is a float: give a dict"),
        ("c.json", "{", r"c\.json: not valid JSON"),
        ("c.json", "[1]", "holds a list: give names and settings"),
        ("c.yaml", "a: [", r"c\.yaml: not valid YAML"),
        ("c.toml", "a =", r"c\.toml: not valid TOML"),
        ("c.ini", "", r"\.ini is not allowed: \.py, \.json, \.yaml or \.toml"),
    ],
)
def test_a_wrong_file_is_refused_by_name(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(ValueError, match=r"config nowhere\.py: no such file"):
        load_config("nowhere.py")
    with pytest.raises(ValueError, match="config is a int: give a path"):
        load_config(3)


def test_a_wrong_config_ends_the_launch_before_a_group_is_joined(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="no section 'freq_cache'"):
        launch_from_torch({"BATCH_SIZE": 3})
    with pytest.raises(RuntimeError, match="RANK"):
        launch_from_torch({"freq_cache": SECTION})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (dict(plugin="gemini"), "plugin='gemini' cannot hold cached tables: it keeps parameters in chunks"),
        (dict(plugin="low_level_zero"), "flat master copies"),
        (dict(plugin="torch_ddp"), 'use plugin="freqcache"'),
        (dict(plugin="fast"), "Choose one of 'freqcache', 'hybrid'"),
        (dict(plugin="hybrid", precision="fp16"), "precision='fp16' is not allowed with cached tables"),
        (dict(plugin="hybrid", zero_stage=1), "zero_stage=1 is not allowed"),
    ],
)
def test_plugins_that_cannot_hold_tables_are_refused(parallel, message):
    with pytest.raises(ValueError, match=message):
        build_plugin({"freq_cache": SECTION, "parallel": parallel})


def test_a_plugin_without_a_process_group_says_what_to_call():
    with pytest.raises(RuntimeError, match="no process group: call .*launch_from_torch"):
        build_plugin({"freq_cache": SECTION})


# ---- launches -------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def clean_environment(bin_on_path=True):
    """`colossalai run` exports every variable again, unquoted: few, and simple ones."""
    path = os.environ["PATH"]
    if bin_on_path:
        path = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    return {"PATH": path, "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}


def wait_until_ended(pid, timeout_s=120):
    """Until process `pid` has ended of itself, its parent not having asked for its code (TimeoutError)."""
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} still runs after {timeout_s} s")
        time.sleep(0.05)


def launch(*command, timeout=300, environment=None, check=True):
    """The output of a launcher, in a clean environment."""
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=environment or clean_environment(),
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done if not check else done.stdout


def colossalai_run(processes, *arguments, **options):
    command = ("colossalai", "run", "--nproc_per_node", processes, "--master_port", free_port(), EXAMPLE)
    return launch(*command, *arguments, **options)


def torchrun(processes, *arguments, **options):
    """The same without colossalai's own command, which takes as long to import as a rank."""
    command = ("torchrun", "--nproc_per_node", processes, "--master_port", free_port(), EXAMPLE)
    return launch(*command, *arguments, **options)


def result_of(output):
    """(auroc, log loss, hit ratio) of the line that the example ends with."""
    found = re.search(r"auroc=(\S+) baseline_auroc=\S+ logloss=(\S+) hit_ratio=(\S+)", output)
    assert found, output[-3000:]
    return tuple(map(float, found.groups()))


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """Makes config files of a small synthetic stream with a cache that evicts, by sharding."""
    folder = tmp_path_factory.mktemp("configs")

    def make(sharding="column", **settings):
        section = dict(cache_ratio=0.04, evict_strategy="dataset", optimizer="adagrad", sharding=sharding, window=0)
        section.update(settings)
        path = folder / f"config{len(list(folder.iterdir()))}.py"
        path.write_text(
            "SYNTHETIC = 'kaggle'\n"
            "SYNTHETIC_OPTIONS = dict(scale=0.001, num_train=4000, num_test=2000)\n"
            "EMBEDDING_DIM, BATCH_SIZE = 6, 64\n"
            "BOTTOM_MLP, TOP_MLP = (16,), (16,)\n"
            f"freq_cache = {section!r}\n"
        )
        return path

    return make


@pytest.fixture(scope="module")
def one_process(config_of):
    """What a single process without a launcher prints."""
    return result_of(launch(sys.executable, EXAMPLE, "--config", config_of()))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["column", "row", "table"])
def test_two_processes_give_the_result_of_one(sharding, config_of, one_process, tmp_path):
    """The last batches are uneven; the cache evicts on the way."""
    path = tmp_path / "results.json"
    run = colossalai_run if sharding == "column" else torchrun
    auroc, log_loss, _ = result_of(run(2, "--config", config_of(sharding), "--json", path))
    assert auroc == pytest.approx(one_process[0], abs=5e-5)
    assert log_loss == pytest.approx(one_process[1], abs=5e-5)
    results = json.loads(path.read_text())
    assert results["processes"] == 2 and results["cache"]["evictions"] > 500


@pytest.mark.slow
def test_one_launched_process_gives_the_digits_of_one_without_a_launcher(config_of, one_process):
    assert result_of(colossalai_run(1, "--config", config_of())) == one_process


@pytest.mark.slow
def test_looking_ahead_changes_no_digit(config_of, one_process):
    """The next batches are known, and the next one's rows are admitted ahead: other hits, the same values."""
    ahead = result_of(torchrun(1, "--config", config_of(window=16, depth=1)))
    assert ahead[:2] == one_process[:2]
    assert ahead[2] != one_process[2], "nothing was admitted ahead"


@pytest.mark.slow
def test_two_nodes_of_two_processes(config_of, one_process):
    """Two launchers meet, as on two machines: the same result, printed once, by the first."""
    port, config = free_port(), config_of()
    node = (
        "torchrun",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
    )
    second = subprocess.Popen(
        [*node, "--node_rank", "1", str(EXAMPLE), "--config", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )
    try:
        output = launch(*node, "--node_rank", "0", EXAMPLE, "--config", config)
        said, _ = second.communicate(timeout=60)
    finally:
        second.kill()
    assert second.returncode == 0 and "auroc=" not in said, said[-3000:]
    auroc, log_loss, _ = result_of(output)
    assert auroc == pytest.approx(one_process[0], abs=5e-5) and log_loss == pytest.approx(one_process[1], abs=5e-5)


@pytest.mark.slow
def test_launches_in_a_row_all_end_well(config_of):
    """No rank may abort at exit, as gloo ranks do when torch._dynamo is imported after the process group."""
    config, count = config_of(), int(os.environ.get("FREQCACHE_LAUNCHES", "1"))
    codes = [colossalai_run(2, "--config", config, "--steps", 2, check=False).returncode for _ in range(count)]
    assert codes == [0] * count


@pytest.mark.slow
def test_a_killed_rank_ends_the_launch(config_of, tmp_path):
    """SIGKILL in the middle of training: the other rank fails with a message, and the launcher with a code.

    Ours, where it waits in an exchange of rows; that of torch's backend, where it waits in that of dense gradients.
    The launcher stands still meanwhile: where it sees the death first, it ends the other rank before that can speak.
    """
    config = tmp_path / "long.py"
    config.write_text(config_of().read_text().replace("num_train=4000", "num_train=400_000"))
    arguments = ["--config", str(config), "--steps", "3000"]  # a line every 300
    process = subprocess.Popen(
        ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), str(EXAMPLE), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**clean_environment(), "PYTHONUNBUFFERED": "1"},
    )
    try:
        for line in process.stdout:
            if line.startswith("train "):
                break
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) == 2, children
        process.send_signal(signal.SIGSTOP)
        os.kill(int(children[1]), signal.SIGKILL)
        wait_until_ended(int(children[0]))
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        said = r"could not exchange with the others|Connection (reset|closed) by peer"
        assert re.search(said, output), output[-3000:]
    finally:
        process.kill()


@pytest.mark.slow
def test_without_torchrun_on_the_path_the_launch_fails_with_a_message(config_of, tmp_path):
    """`colossalai` by its full name, in an environment whose bin is not on PATH."""
    environment = {**clean_environment(bin_on_path=False), "PATH": "/usr/bin:/bin"}
    command = (Path(sys.executable).parent / "colossalai", "run", "--nproc_per_node", 1, EXAMPLE)
    done = launch(*command, "--config", config_of(), environment=environment, check=False)
    assert done.returncode != 0 and "torchrun" in done.stdout and "not found" in done.stdout


def test_a_wrong_section_ends_the_example_with_one_line(tmp_path):
    config = tmp_path / "wrong.py"
    config.write_text(
        "SYNTHETIC = 'kaggle'\nSYNTHETIC_OPTIONS = dict(scale=0.001)\nfreq_cache = dict(cache_ration=0.1)\n"
    )
    done = launch(sys.executable, EXAMPLE, "--config", config, check=False)
    assert done.returncode == 2 and "error: freq_cache: unknown 'cache_ration'" in done.stdout, done.stdout[-2000:]
    assert "Traceback" not in done.stdout
