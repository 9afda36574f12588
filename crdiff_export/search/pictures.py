"""The check's pictures, dense beside what was found, where the two differ most."""

from crdiff_export.evaluate import page
from crdiff_export.evaluate.report import ContactSheet
from crdiff_export.search import report_text
from crdiff_export.search.found import Found
from crdiff_export.sizes import Size


def contact(found: Found, size: Size) -> ContactSheet:
    """A sheet of the pairs at a size where pruning changes the score most, for the worse first, then for the better."""
    made = found.evaluation
    assert made
    subject = next(one for one in made.subjects if one.size == size)
    title = f"{made.base} at {size}: where the models differ most"
    return page.differences(made, subject, title, report_text.facts(found))
