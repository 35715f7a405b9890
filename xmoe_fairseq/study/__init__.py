"""``xmoe study``: models trained side by side with several seeds, scored, and compared claim by claim.

``plan`` reads which models and claims; ``runs`` trains and measures one model with one seed; ``jobs`` runs several at
a time; ``results`` adds up the seeds; ``claims`` tests the claims; ``page`` and ``figures`` show it all.
"""
