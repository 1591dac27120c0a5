"Which build of torch a GPU needs: how it is installed, and what is said when it is another one"
import re
import subprocess
from pathlib import Path

import pytest
import torch

from cramlit.core.devices import check_build, choose_precision, pick_device
from cramlit.core.recipes import CramlitError
from cramlit.training import distributed

ROOT = Path(__file__).parent.parent
CUDA = torch.device('cuda')
CUDA_13 = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120']
CUDA_12 = ['sm_50', 'sm_60', 'sm_70', 'sm_75', 'sm_80', 'sm_86', 'sm_90']


def commands(*settings):
    "What `make env` would run"
    done = subprocess.run(['make', '--dry-run', '--always-make', 'env', 'VENV=nowhere', *settings], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    return done.stdout


def test_make_env_takes_the_build_that_is_asked_for():
    older, usual = commands('TORCH=cu126'), commands()
    version = "torch==$(sed -n 's/^torch==//p' requirements.lock)"
    assert f'{version}+cu126 --index-url https://download.pytorch.org/whl/cu126\n' in older
    assert f'{version} \n' in usual and 'index-url' not in usual
    # the lock file comes second, and asks for the version without its +cu126, which the build satisfies
    assert older.index('+cu126') < older.index('-r requirements.lock')
    stamps = [text[text.index('touch'):].split()[1] for text in (older, usual)]
    assert stamps[0] == stamps[1] + '-cu126', 'another build is another environment'


@pytest.fixture
def gpu(monkeypatch):
    "A GPU of some capability, and a build of torch for some"
    def put(capability, builds):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA TITAN V')
        monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: builds)
    return put


@pytest.mark.parametrize('capability, builds', [
    ((7, 0), CUDA_12), ((7, 5), CUDA_12), ((7, 5), CUDA_13), ((8, 6), CUDA_13), ((8, 9), CUDA_13),
    ((9, 0), CUDA_12), ((12, 1), CUDA_13), ((13, 0), CUDA_13), ((9, 0), ['gfx90a']), ((9, 0), [])])
def test_a_build_that_has_code_for_the_gpu_is_taken(gpu, capability, builds):
    gpu(capability, builds)
    check_build(CUDA)


def test_the_gpus_of_the_paper_are_told_what_to_install(gpu):
    gpu((7, 0), CUDA_13)
    with pytest.raises(CramlitError) as e: choose_precision(CUDA)
    line = str(e.value)
    assert line.startswith('NVIDIA TITAN V has compute capability 7.0, and torch ')
    assert 'built for 7.5, 8.0, 8.6, 9.0' in line and 'make env TORCH=cu126' in line and '\n' not in line
    assert re.search(r'pip install torch==[\d.]+\+cu126 --index-url', line), 'pip leaves one that is there'


def test_a_gpu_that_is_too_new_is_told_so(gpu):
    gpu((10, 0), CUDA_12)  # its code for 9.0 is of another major version, and not portable
    with pytest.raises(CramlitError, match='take a newer torch'): check_build(CUDA)


def test_a_build_for_cuda_12_is_told_of_the_other_one(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '12.6')
    gpu((12, 0), CUDA_12)
    with pytest.raises(CramlitError, match='CUDA 13: rm -r .venv and make env'): check_build(CUDA)
    gpu((3, 5), CUDA_12)
    with pytest.raises(CramlitError, match='no build of this torch has code for it'): check_build(CUDA)


def test_attention_is_never_that_of_cudnn(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert pick_device() == CUDA and not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize('size', ['1', '2'])
def test_a_process_says_so_before_it_meets_the_others(gpu, monkeypatch, size):
    gpu((7, 0), CUDA_13)
    monkeypatch.setenv('WORLD_SIZE', size)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setattr(distributed, 'pick_device', lambda: CUDA)
    with pytest.raises(CramlitError, match='make env TORCH=cu126'), distributed.join_world(): pass
