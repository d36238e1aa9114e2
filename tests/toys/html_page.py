"""An HTML page as tests look at it."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "wbr"}


class Page(HTMLParser):
    """What stands in a page, with a check that its tags are nested."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] not in (["style"], ["script"]) else ""

    def all(self, tag, css_class=""):
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and css_class in [*(attrs.get("class") or "").split(" "), ""]
        ]
