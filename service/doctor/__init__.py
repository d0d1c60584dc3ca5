"""`perennial doctor`: compares the database with itself, with the files and with the engines."""
