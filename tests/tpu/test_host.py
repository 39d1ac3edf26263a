"""`tpu/host`: how a host starts, refuses and stops a run."""

import pytest

RUN = "experiments/offline/hh.py:dpo --name '$x y'"


def test_the_run_is_a_service_whose_words_systemd_leaves_alone(cloud):
    done = cloud.run(f"bash tpu/host start /mnt/jaxalign {RUN}", answers="dead")
    assert done.returncode == 0, done.stderr
    service = next(words for words in cloud.recorded if "systemd-run" in words)
    assert {"--unit=jaxalign", "--remain-after-exit"} <= set(service)
    assert "--property=After=jaxalign-bucket.service" in service
    program = str(cloud.folder / "venv" / "bin" / "jaxalign")
    run = ["train", "experiments/offline/hh.py:dpo", "--name", "$$x y"]
    assert service[service.index(program) + 1 :] == [*run, "--output", "/mnt/jaxalign/runs"]


@pytest.mark.parametrize("words", [f"start /mnt/jaxalign {RUN}", "setup runs /mnt/jaxalign"])
def test_a_run_that_goes_on_is_left_alone(cloud, words):
    done = cloud.run(f"bash tpu/host {words}", answers="running")
    assert done.returncode == 1
    assert "a run is going on" in done.stderr
    assert [words for words in cloud.recorded if words[0] == "sudo"] == []


def test_setup_installs_the_commit_and_mounts_without_caches(cloud):
    cloud.add(cloud.folder / "programs" / "gcsfuse")
    cloud.add(cloud.folder / "programs" / "mountpoint", "#!/bin/sh\nexit 1\n")
    cloud.add(cloud.folder / ".local" / "bin" / "uv")
    mount = cloud.folder / "mount"
    done = cloud.run(f"bash tpu/host setup my-runs {mount}", answers="dead")
    assert done.returncode == 0, done.stderr
    bundle = str(cloud.folder / "jaxalign.bundle")
    assert ["git", "-C", "jaxalign", "fetch", "--quiet", bundle, "HEAD"] in cloud.recorded
    assert cloud.recorded[5] == ["uv", "pip", "install", "--quiet", "--editable", "jaxalign[tpu]"]
    service = next(words for words in cloud.recorded if "systemd-run" in words)
    assert "--unit=jaxalign-bucket" in service
    assert service[-2:] == ["my-runs", str(mount)]
    assert {"--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"} <= set(service)
    assert "--rename-dir-limit=0" in service
    assert (mount / "runs").is_dir()


def test_another_bucket_is_not_taken_for_this_one(cloud):
    cloud.add(cloud.folder / "programs" / "gcsfuse")
    cloud.add(cloud.folder / "programs" / "mountpoint", "#!/bin/sh\nexit 0\n")
    cloud.add(cloud.folder / "programs" / "findmnt", "#!/bin/sh\necho my-runs\n")
    cloud.add(cloud.folder / ".local" / "bin" / "uv")
    assert cloud.run("bash tpu/host setup my-runs /mnt/jaxalign", answers="dead").returncode == 0
    done = cloud.run("bash tpu/host setup others /mnt/jaxalign", answers="dead")
    assert done.returncode == 1
    assert "another bucket" in done.stderr
    assert [words for words in cloud.recorded if words[0] == "sudo"] == []


def test_stop_asks_systemd(cloud):
    assert cloud.run("bash tpu/host stop").returncode == 0
    assert ["sudo", "systemctl", "stop", "jaxalign"] in cloud.recorded


def test_another_word_is_refused(cloud):
    done = cloud.run("bash tpu/host destroy")
    assert done.returncode == 2
    assert cloud.recorded == []
