"""Web page that draws images while one watches: demo.py."""
