"""What says how good a picture is: one module for each scorer."""
