"""A damaged file is read or refused with a `ValueError`: a fixed corpus here, ten minutes of it with `make fuzz`."""

import numpy as np
import pytest
from damage import READERS, damaged, survives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = 40  # damaged files for each reader


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    pytest.importorskip("tokenizers", reason="needs the extra `models`")
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    reader = READERS[request.param]
    reader.make(tmp_path)
    return reader


def test_the_corpus(reader, tmp_path):
    whole = (tmp_path / reader.damaged).read_bytes()
    assert survives(reader, tmp_path, whole)
    read = [survives(reader, tmp_path, damaged(reader, whole, np.random.default_rng([0, i]))) for i in range(CORPUS)]
    assert reader.lenient or not all(read)  # some are refused: the damage is not idle


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes(reader, tmp_path, content):
    survives(reader, tmp_path, content)
