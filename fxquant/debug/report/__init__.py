"""What the views share: tables, reports, pages and charts."""
