"""`tpu/slice`: the commands that it prints and runs, what it refuses, and a kept slice."""

import shlex

import pytest

WHERE = {"PROJECT": "research", "ZONE": "us-east5-a", "BUCKET": "gs://runs/", "TYPE": "v5p-128"}
RUN = "experiments/offline/hh.py:dpo --scale paper --name 'two words' --loss-options beta 0.2"
QUESTION = "--command=systemctl show --property=SubState --value jaxalign"
COMMANDS = {
    "create": "",
    "setup": "",
    "start": RUN,
    "follow": "",
    "stop": "",
    "delete": "",
}


def line(command, flags="", run=""):
    return f"tpu/slice {command} --name dpo {flags} {run}"


def flag(words, name):
    """The value of --name=value among the words of a command."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    assert len(values) == 1, words
    return values[0]


@pytest.mark.parametrize("command", [*COMMANDS, "status", "keep"])
def test_every_command_names_slice_project_and_zone(cloud, command):
    run = RUN if command in ("start", "keep") else ""
    printed = cloud.printed(line(command, "--dry-run", run), **WHERE)
    to_cloud = [words for words in printed if words[0] == "gcloud"]
    assert to_cloud
    for words in to_cloud:
        assert flag(words, "--project") == "research"
        assert flag(words, "--zone") == "us-east5-a"
        assert {"dpo", "dpo:"} & set(words)


def test_create_asks_for_the_type_and_its_image(cloud):
    (words,) = cloud.printed(line("create", "--dry-run"), **WHERE)
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "dpo"]
    assert flag(words, "--node-id") == "dpo"
    assert flag(words, "--accelerator-type") == "v5p-128"
    assert flag(words, "--runtime-version") == "v2-alpha-tpuv5"
    assert "--spot" not in words


def test_create_spot_with_another_image_and_flag(cloud):
    flags = "--spot --runtime v9 --with --service-account=me --dry-run"
    (words,) = cloud.printed(line("create", flags), **WHERE)
    assert {"--spot", "--service-account=me", "--runtime-version=v9"} <= set(words)


@pytest.mark.parametrize(
    ("given", "kind", "image"),
    [("v5p:4x4x4", "v5p", "v2-alpha-tpuv5"), ("v5e:8x8", "v5litepod", "v2-alpha-tpuv5-lite")],
)
def test_a_type_may_be_a_topology_of_plan(cloud, given, kind, image):
    (words,) = cloud.printed(line("create", f"--type {given} --dry-run"), **WHERE)
    assert flag(words, "--type") == kind
    assert flag(words, "--topology") == given.partition(":")[2]
    assert flag(words, "--runtime-version") == image
    assert not any(word.startswith("--accelerator-type") for word in words)


def test_setup_copies_the_commit_to_all_hosts_and_mounts_the_bucket(cloud):
    _, pack, _, copy, remote = cloud.printed(line("setup", "--dry-run"), **WHERE)
    assert pack[-4:-2] == ["create", "--quiet"]
    assert pack[-1] == "HEAD"
    assert pack[-2] in copy
    assert flag(copy, "--worker") == flag(remote, "--worker") == "all"
    assert flag(remote, "--command") == "bash host setup runs /mnt/jaxalign"


@pytest.mark.parametrize("words", ["two words", "it's", 'a "b"', "$HOME", "{a,b}", "", "~", "a;b"])
def test_start_hands_every_word_to_all_hosts_as_it_is(cloud, words):
    run = shlex.join(["experiments/offline/hh.py:dpo", "--name", words])
    (command,) = cloud.printed(line("start", "--dry-run", run), **WHERE)
    assert flag(command, "--worker") == "all"
    start = ["bash", "host", "start", "/mnt/jaxalign", "experiments/offline/hh.py:dpo"]
    assert shlex.split(flag(command, "--command")) == [*start, "--name", words]


def test_follow_takes_one_host(cloud):
    (words,) = cloud.printed(line("follow", "--worker 3 --dry-run"), **WHERE)
    assert flag(words, "--worker") == "3"
    assert flag(words, "--command") == "bash host follow"


def test_stop_reaches_all_hosts(cloud):
    (words,) = cloud.printed(line("stop", "--dry-run"), **WHERE)
    assert flag(words, "--worker") == "all"
    assert flag(words, "--command") == "bash host stop"


def test_delete_leaves_the_question_to_gcloud(cloud):
    (words,) = cloud.printed(line("delete", "--dry-run"), **WHERE)
    assert words[4:6] == ["delete", "dpo"]
    assert "--force" in words
    assert "--quiet" not in words


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_is_what_is_run(cloud, command):
    printed = cloud.printed(line(command, "--dry-run", COMMANDS[command]), **WHERE)
    done = cloud.run(line(command, run=COMMANDS[command]), **WHERE)
    assert done.returncode == 0, done.stderr
    assert cloud.recorded == [words for words in printed if words[0] in ("gcloud", "git")]


def test_status_asks_the_hosts_of_an_active_slice_only(cloud):
    printed = cloud.printed(line("status", "--dry-run"), **WHERE)
    done = cloud.run(line("status"), answers="ACTIVE running", **WHERE)
    assert cloud.recorded == printed
    assert done.stdout.split() == ["ACTIVE", "running"]
    done = cloud.run(line("status"), answers="WAITING_FOR_RESOURCES", **WHERE)
    assert done.stdout.split() == ["WAITING_FOR_RESOURCES"]
    assert len(cloud.recorded) == 1


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("create", "PROJECT"),
        ("create", "ZONE"),
        ("create", "NAME"),
        ("create", "TYPE"),
        ("setup", "BUCKET"),
        ("keep", "BUCKET"),
        ("keep", "TYPE"),
        ("follow", "ZONE"),
        ("stop", "NAME"),
        ("delete", "PROJECT"),
    ],
)
def test_a_missing_setting_is_one_line_with_flag_and_mend(cloud, command, missing):
    settings = {name: value for name, value in WHERE.items() if name != missing}
    given = "" if missing == "NAME" else "--name dpo"
    run = RUN if command == "keep" else ""
    done = cloud.run(f"tpu/slice {command} {given} {run}", **settings)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"--{missing.lower()}" in done.stderr
    assert f"set {missing}" in done.stderr
    assert cloud.recorded == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("start --name dpo", "experiment is missing"),
        ("start --name dpo experiments/none.py", "experiments/none.py: there is no such file"),
        ("start --name dpo experiments/quickstart.py --output x", "--output"),
        ("create --name dpo --type v9-8", "--runtime is missing"),
        ("create --name dpo --colour red", "--colour"),
        ("create --name", "--name: a value is missing"),
        ("stop --name dpo now", "now: stop takes settings alone"),
        ("destroy", "there is no command destroy"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(cloud, words, said):
    done = cloud.run(f"tpu/slice {words}", **WHERE)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert cloud.recorded == []


@pytest.mark.parametrize("command", ["delete", f"keep {RUN}"])
def test_nothing_is_deleted_by_a_name_from_the_environment(cloud, command):
    done = cloud.run(f"tpu/slice {command}", NAME="dpo", **WHERE)
    assert done.returncode == 2
    assert "--name is missing" in done.stderr
    assert cloud.recorded == []


def kept(cloud, answers, flags="", run=RUN):
    done = cloud.run(line("keep", f"--every 0 {flags}", run), answers=answers, **WHERE)
    acts = [words for words in cloud.recorded if QUESTION not in words and "describe" not in words]
    return done, acts


def test_keep_creates_a_pre_empted_slice_again_and_starts_the_same_run(cloud):
    printed = cloud.printed(line("keep", "--spot --dry-run", RUN), **WHERE)
    bundle, delete, create, copy, begin = (
        words
        for words in printed
        if words[0] in ("gcloud", "git") and "describe" not in words
        if QUESTION not in words
    )
    answers = """ACTIVE dead ACTIVE running SUSPENDING SUSPENDED WAITING_FOR_RESOURCES PROVISIONING
        ACTIVE dead ACTIVE running ACTIVE exited"""
    done, acts = kept(cloud, answers, "--spot")
    assert done.returncode == 0, done.stderr
    assert acts == [bundle, copy, begin, delete, create, copy, begin]
    assert {"--force", "--quiet", "dpo"} <= set(delete)
    assert {"--spot", "--accelerator-type=v5p-128"} <= set(create)
    assert flag(begin, "--worker") == "all"
    stop, setup, start = flag(begin, "--command").split(" && ")
    assert stop == "bash host stop"
    assert setup == "bash host setup runs /mnt/jaxalign"
    assert shlex.split(start) == ["bash", "host", "start", "/mnt/jaxalign", *shlex.split(RUN)]
    assert "costs until it is deleted" in done.stderr


@pytest.mark.parametrize("state", ["SUSPENDED", "PREEMPTED", "FAILED"])
def test_keep_deletes_only_in_these_states(cloud, state):
    done, acts = kept(cloud, f"{state} ACTIVE exited")
    assert done.returncode == 0, done.stderr
    assert [words[4] for words in acts if "queued-resources" in words] == ["delete", "create"]


def test_keep_deletes_a_finished_slice_where_asked(cloud):
    done, acts = kept(cloud, "ACTIVE running ACTIVE exited", "--delete-finished")
    assert done.returncode == 0, done.stderr
    assert [words[4:6] for words in acts if "queued-resources" in words] == [["delete", "dpo"]]


def test_keep_leaves_a_run_alone_that_cannot_be_asked(cloud):
    done, acts = kept(cloud, "no ACTIVE no ACTIVE running ACTIVE stop-sigterm ACTIVE exited")
    assert done.returncode == 0, done.stderr
    assert [words for words in acts if words[0] == "gcloud"] == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("ACTIVE failed " * 3, "the run ended 2 times"),
        ("FAILED " * 3, "the request failed 2 times"),
        ("no no no", "no word of dpo 2 times"),
    ],
)
def test_keep_gives_up_after_some_tries(cloud, answers, said):
    done, _ = kept(cloud, answers, "--tries 2")
    assert done.returncode == 1
    assert said in done.stderr
    assert "still costs" in done.stderr


def test_hosts_run_a_commit(cloud):
    changed = "#!/bin/sh\necho ' M jaxalign/cli.py'\n"
    cloud.add(cloud.folder / "programs" / "git", changed)
    done = cloud.run(line("setup"), **WHERE)
    assert done.returncode == 2
    assert "not committed" in done.stderr
    assert cloud.recorded == []
