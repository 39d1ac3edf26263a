"""`tpu/gke`: the commands for xpk that it prints and runs, and what it refuses."""

import shlex

import pytest

WHERE = {
    "PROJECT": "research",
    "ZONE": "us-east5-a",
    "BUCKET": "gs://runs",
    "TYPE": "v5p-128",
}
RUN = "experiments/offline/hh.py:dpo --scale paper --name 'two words'"
NAMES = "--cluster pods --workload dpo"
COMMANDS = {"create": "", "start": RUN, "follow": "", "status": "", "stop": "", "delete": ""}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_is_what_is_run(cloud, command):
    line = f"tpu/gke {command} {NAMES}"
    printed = cloud.printed(f"{line} --dry-run {COMMANDS[command]}", **WHERE)
    done = cloud.run(f"{line} {COMMANDS[command]}", **WHERE)
    assert done.returncode == 0, done.stderr
    assert cloud.recorded == [words for words in printed if words[0] != "mkdir"]
    for words in cloud.recorded:
        if words[0] == "xpk":
            assert {"--cluster=pods", "--project=research", "--zone=us-east5-a"} <= set(words)


@pytest.mark.parametrize(
    ("flags", "capacity"),
    [("", "--on-demand"), ("--spot", "--spot"), ("--reservation r", "--reservation=r")],
)
def test_a_cluster_has_one_kind_of_capacity_and_the_bucket(cloud, flags, capacity):
    cluster, bucket = cloud.printed(f"tpu/gke create {NAMES} {flags} --dry-run", **WHERE)
    assert {"--tpu-type=v5p-128", "--enable-gcsfuse-csi-driver", capacity} <= set(cluster)
    assert len({"--on-demand", "--spot", "--reservation=r"} & set(cluster)) == 1
    assert {"--bucket=runs", "--mount-point=/mnt/jaxalign", "--auto-mount=true"} <= set(bucket)
    (options,) = [word.partition("=")[2] for word in bucket if word.startswith("--mount-options=")]
    assert set(options.split(",")) == {
        "metadata-cache:ttl-secs:0",
        "metadata-cache:negative-ttl-secs:0",
        "file-system:rename-dir-limit:0",
    }


def test_a_workload_runs_the_commit_and_the_same_words(cloud):
    *_, pack, workload = cloud.printed(f"tpu/gke start {NAMES} --dry-run {RUN}", **WHERE)
    (folder,) = [word[13:] for word in workload if word.startswith("--script-dir=")]
    assert f"{folder}/jaxalign.bundle" in pack
    (command,) = [word[10:] for word in workload if word.startswith("--command=")]
    run = shlex.split(command.rpartition(" && ")[2])
    assert run == [
        *("exec", "jaxalign", "train"),
        *shlex.split(RUN),
        *("--output", "/mnt/jaxalign/runs"),
    ]
    assert {"--workload=dpo", "--tpu-type=v5p-128"} <= set(workload)


def test_follow_takes_one_host(cloud):
    credentials, logs = cloud.printed(f"tpu/gke follow {NAMES} --worker 3 --dry-run", **WHERE)
    assert "--region=us-east5" in credentials
    (labels,) = [word for word in logs if word.startswith("--selector=")]
    assert "jobset-name=dpo" in labels
    assert labels.endswith("job-completion-index=3")


@pytest.mark.parametrize("missing", ["PROJECT", "ZONE", "BUCKET", "TYPE", "CLUSTER"])
def test_a_missing_setting_is_one_line_with_flag_and_mend(cloud, missing):
    settings = {name: value for name, value in WHERE.items() if name != missing}
    given = "" if missing == "CLUSTER" else "--cluster pods"
    done = cloud.run(f"tpu/gke create {given}", **settings)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"--{missing.lower()} is missing" in done.stderr
    assert f"set {missing}" in done.stderr
    assert cloud.recorded == []


@pytest.mark.parametrize(
    "words",
    [
        "delete",
        "stop",
        "stop --cluster pods",
        "stop --workload dpo",
        "stop --cluster pods --workload ''",
    ],
)
def test_nothing_is_deleted_by_a_name_from_the_environment(cloud, words):
    done = cloud.run(f"tpu/gke {words}", CLUSTER="pods", WORKLOAD="dpo", **WHERE)
    assert done.returncode == 2
    assert "named on the command line" in done.stderr
    assert cloud.recorded == []
