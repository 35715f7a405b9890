"""BLEU, chrF++ and spBLEU by sacreBLEU: of whole test sets, and of sentences that are drawn from them."""
