"""What people look at: a contact sheet of labelled pictures, as a PNG and as an HTML page that needs nothing else."""

from crdiff_export.evaluate.report.contact import Contact, Row, Shot

__all__ = ["Contact", "Row", "Shot"]
