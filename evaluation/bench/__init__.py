"""`vtprune bench`: what pruning does to the speed and the answers of a user's own model, on a user's own machine.

`subjects` are the pictures and questions, `rounds` asks a server about them, arm by arm in turns, `summary` computes
what is concluded, and `report` writes it. `command` is the command.
"""
