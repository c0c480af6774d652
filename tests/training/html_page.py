"""What tests look at in a page: its tags, their attributes and its texts."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

NEVER_CLOSED = ("meta", "img", "source")


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in NEVER_CLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def images(self):
        return [attrs["src"].split(",", 1) for tag, attrs in self.tags if tag == "img"]

    @property
    def text(self):
        return " ".join(filter(None, self.texts))

    @property
    def photographs(self):
        """The JPEG pictures, decoded."""
        return [Image.open(io.BytesIO(base64.b64decode(c))) for kind, c in self.images if "jpeg" in kind]

    def assert_harmless(self):
        """Nothing in it runs, loads or leads anywhere outside the page."""
        assert not {tag for tag, _ in self.tags} & {"script", "i", "iframe", "link", "object", "form", "base"}
        for _, attrs in self.tags:
            assert not any(name.startswith("on") for name in attrs)
            assert attrs.get("srcset", "data:").startswith("data:")
            assert attrs.get("src", "data:").startswith("data:") and attrs.get("href", "#").startswith("#")
        policy = [attrs["content"] for tag, attrs in self.tags if tag == "meta" and "http-equiv" in attrs]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
