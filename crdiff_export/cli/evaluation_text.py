"""The scores of an evaluation as people see them: a table for each size, and sentences."""

from crdiff_export.cli.blocks import Block, Table
from crdiff_export.evaluate import report_text
from crdiff_export.evaluate.results import Evaluation


def score_tables(evaluation: Evaluation) -> list[Block]:
    """Make a table for each size, below its name; in one table the names would leave no room for the verdicts.

    Args:
        evaluation: The evaluation.

    Returns:
        The blocks, with a line between the sizes.
    """
    (_, *columns), rows = report_text.table(evaluation)
    text: list[Block] = []
    group: list[list[str]] = []
    for size, *cells in rows:
        if size:
            group = []
            text += [
                *([""] if text else []),
                f"{size}:",
                Table(columns, group, report_text.NUMERIC, report_text.OPTIONAL),
            ]
        group.append(cells)
    return text


def sentences(evaluation: Evaluation) -> list[Block]:
    """Make the lines below the tables: what is shown of every model.

    Args:
        evaluation: The evaluation.

    Returns:
        The lines.
    """
    return [f"{verdict}: {text}" if verdict else text for verdict, text in report_text.verdicts(evaluation)]
