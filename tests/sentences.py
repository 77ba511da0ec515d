"""Whether what is raised is one sentence that a person reads at once."""

import re

FOLDERS = re.compile(r"/[^\s'\",;()]*/")  # of a path; where a test's folder lies is nothing of the sentence's


def one_sentence(error) -> bool:
    """Of a text, an error or what `pytest.raises` gives: one line with one full stop, its folders not counted."""
    text = str(getattr(error, "value", error))
    return text.endswith(".") and not text.endswith("..") and "\n" not in text and len(FOLDERS.sub("", text)) < 500
