"""One thread pool, torch's: who owns it, who may disturb it, and what survives a fork."""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = "import torch, sparseprop\nlayer = sparseprop.nn.SparseLinear.random(256, 256, density=0.2)\n"


def run(code: str) -> str:
    """Standard output of a fresh interpreter; its thread pools are its own."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
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
