"""What a package looks like from outside: its facts, and the page that shows them. Nothing is printed here."""
