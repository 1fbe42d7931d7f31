"""One thread pool, torch's: who owns it, who may disturb it, and what survives a fork."""

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = "import torch, sparseprop\nlayer = sparseprop.nn.SparseLinear.random(256, 256, density=0.2)\n"


def run(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter; its thread pools are its own."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_use_the_openmp_runtime_that_torch_brought():
    out = run("""
        from threadpoolctl import threadpool_info
        layer(torch.randn(512, 256)).sum().backward()
        print(sum(pool["user_api"] == "openmp" for pool in threadpool_info()))
    """)
    assert out.split() == ["1"]


def test_a_second_openmp_runtime_changes_no_result():
    out = run("""
        import sklearn.cluster
        from threadpoolctl import threadpool_info
        x = torch.randn(512, 256)
        before = layer(x)
        sklearn.cluster.KMeans(2, n_init=1).fit(x.numpy())
        runtimes = sum(pool["user_api"] == "openmp" for pool in threadpool_info())
        print(runtimes > 1, torch.equal(layer(x), before))
    """)
    assert out.split() == ["True", "True"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_worker_can_use_a_layer_that_was_used_before(threads):
    out = run(f"""
        import warnings
        warnings.simplefilter("ignore")
        torch.set_num_threads({threads})
        x = torch.randn(512, 256)
        layer(x).sum().backward()

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, i):
                with torch.no_grad():
                    return layer(x)[i]

        loaded = torch.cat(list(torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2)))
        print(torch.equal(loaded, layer(x)[:8]))
    """)
    assert out.split() == ["True"]


def test_results_do_not_depend_on_the_threads_that_took_work_over():
    """More threads than cores: some are always late, and others take over what they have not begun."""
    out = run("""
        from torch import nn

        def results(module, x):
            x = x.clone().requires_grad_()
            out = module(x)
            out.backward(out.detach().sin())
            return [out, x.grad, *(p.grad.clone() for p in module.parameters())]

        linear = nn.Linear(512, 400)
        linear.weight.data *= torch.rand(400, 512) < 0.05
        linear.weight.data[7] = 1
        skewed = sparseprop.nn.SparseLinear.from_dense(linear)
        conv = sparseprop.nn.SparseConv2d.random(48, 64, 3, padding=1, density=0.1)
        chain = nn.Sequential(
            sparseprop.nn.SparseConv2d.random(48, 64, 1, density=0.1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, groups=64, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
        sparseprop.fuse(chain)
        images = torch.randn(6, 48, 30, 30)
        for module, x in (skewed, torch.randn(900, 512)), (conv, images), (chain, images):
            torch.set_num_threads(1)
            wanted = results(module, x)
            for threads in (2, 3, 7) * 8:
                torch.set_num_threads(threads)
                module.zero_grad()
                got = results(module, x)
                assert all(map(torch.equal, got, wanted)), (type(module).__name__, threads)
        print("equal")
    """)
    assert out.split() == ["equal"]


def test_new_python_threads_keep_to_torchs_number_of_threads():
    code = """
        import threading, psutil
        torch.set_num_threads(1)
        x = torch.randn(512, 256)

        def work():
            with torch.no_grad():
                layer(x)
            counts.append(psutil.Process().num_threads())

        counts = [psutil.Process().num_threads()]
        for _ in range(2):  # the first may find threads that others left behind
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        print(counts[2] - counts[0])
    """
    assert run(code, OMP_NUM_THREADS="2").split() == ["1"]  # the thread itself
