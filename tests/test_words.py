"""Messages of the library: English text, and the key and values that a page translates."""

from __future__ import annotations

import json
import re
from string import Template

import pytest

from i2v_core.words import ENGLISH, message


@pytest.mark.parametrize("key", ENGLISH)
def test_a_sentence_is_filled_with_its_values_and_says_them_apart(key: str) -> None:
    names = set(re.findall(r"\$([a-z]+)", ENGLISH[key]))
    sentence = message(key, **{name: f"<{name}>" for name in names})
    assert "$" not in str(sentence)
    assert set(re.findall(r"<([a-z]+)>", str(sentence))) == names
    sent = json.loads(json.dumps(sentence.as_dict()))
    assert sent["text"] == str(sentence) == Template(ENGLISH[sent["key"]]).substitute(sent["values"])


def test_a_value_that_is_missing_is_a_mistake() -> None:
    with pytest.raises(KeyError, match="place"):
        str(message("whyByHand"))
