"What must not change while modules are renamed: see golden.py"
import golden
import pytest

FIRST = 40  # steps, of the same run that the file has whole


@pytest.fixture(scope='module')
def want():
    return golden.stored()


@pytest.fixture(scope='module')
def same_machine(want):
    return want['machine'] == golden.machine()


def begun(training):
    "The part of a stored training that the first steps make again"
    looks = [x for x in training['validation_losses'] if x[0] < FIRST]
    return dict(validation_losses=looks, losses=training['losses'][:FIRST])


@pytest.mark.parametrize('name', golden.RECIPES)
def test_data_and_first_losses_are_as_stored(name, want, same_machine, tmp_path):
    key = f'{name} tiny'
    data = golden.data_of(name, 'tiny', tmp_path/'data')
    assert golden.differences(want['data'][key], data, same_machine) == []
    first = golden.training_of(name, 'tiny', tmp_path/'data', tmp_path/'run', FIRST)
    assert len(first['losses']) == FIRST
    assert golden.differences(begun(want['training'][key]), first, same_machine) == []


@pytest.mark.slow
def test_everything_is_as_stored(want, tmp_path):
    assert golden.compare(want, golden.everything(tmp_path)) == []
