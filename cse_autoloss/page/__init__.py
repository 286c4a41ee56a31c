"""A run as one page to look at: ``report.html``, and the same page live."""

from cse_autoloss.page.page import page, write_page

__all__ = ["page", "write_page"]
