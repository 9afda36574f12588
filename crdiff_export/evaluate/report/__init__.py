"""What people look at: contact sheets as PNG files, HTML pages and plots, and the rules for where they are written.

Begin with `contact.py`, the records that a sheet and a page are made from. `page.render` and `sheet.render` turn them
into a file's content, `plots.render` does so for a matplotlib figure, and `outputs` checks and writes the files.
"""

from crdiff_export.evaluate.report.contact import ContactSheet, SheetPicture, SheetRow

__all__ = ["ContactSheet", "SheetPicture", "SheetRow"]
