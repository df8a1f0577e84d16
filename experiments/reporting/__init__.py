"""From records to numbers, sentences, pages and figures."""
